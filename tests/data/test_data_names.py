"""Data sets by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from advalign.data import NAMES, load
from advalign.errors import UserError


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar01", "unknown data set 'cifar01': did you mean 'cifar10'"),
        ("npz", "unknown data set 'npz': did you mean 'npz:PATH'"),
        ("folder:", "unknown data set 'folder:': did you mean 'folder:PATH'"),
        ("digits:8", "unknown data set 'digits:8': did you mean 'digits'"),
        ("", "unknown data set ''"),
    ],
)
def test_unknown_names(name: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        load(name)
    for known in NAMES:
        assert known in str(caught.value)


def test_a_file_or_folder_without_its_kind_is_told_how_to_be_named(tmp_path: Path):
    for path, kind in ((tmp_path, "folder"), (tmp_path / "mine.npz", "npz")):
        with pytest.raises(UserError, match=rf"unknown data set '{path}': for .* write {kind}:{path}$"):
            load(str(path))


@pytest.mark.slow
def test_importing_loads_none_of_the_readers():
    code = "import sys, advalign.data; print(*{'sklearn', 'PIL', 'pooch', 'rich'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""
