"""Habits of the tests themselves."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_no_file_imports_from_a_test_module_or_a_conftest(path: Path):
    """What tests share lies in modules that hold no tests."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module or ''}.{alias.name}" for alias in node.names}
    parts = {part for name in imported for part in name.split(".")}
    assert not [part for part in parts if part.startswith("test_") or part == "conftest"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(TESTS).as_posix())
def test_every_generator_has_a_seed(path: Path):
    """Global draws are seeded from the test's name, by a fixture of all tests; a generator of its own is not."""
    unseeded = r"default_rng\(\)|\bRandom\(\)|\bSystemRandom\b|torch\.Generator\([^)]*\)(?!\.manual_seed)"
    assert path == Path(__file__) or not re.findall(unseeded, path.read_text())
