"""Lock files that are held, and that cannot be made."""

from __future__ import annotations

from pathlib import Path

import pytest
from filelock import Timeout

from advalign.errors import UserError
from advalign.runtime.locks import locked


def test_a_lock_is_held_and_freed(tmp_path: Path):
    with locked(tmp_path / ".lock"), pytest.raises(Timeout), locked(tmp_path / ".lock", timeout=0):
        pass
    with locked(tmp_path / ".lock", timeout=0):
        pass


def test_a_lock_that_cannot_be_made_is_a_line(tmp_path: Path):
    (tmp_path / ".lock").mkdir()
    with (
        pytest.raises(UserError, match=r"cannot lock .*\.lock: Is a directory; remove it, or make it writable"),
        locked(tmp_path / ".lock"),
    ):
        pass
