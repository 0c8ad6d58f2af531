"""Habits of the tests themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=lambda path: path.relative_to(TESTS).as_posix())
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
