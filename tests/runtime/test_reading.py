"""What is read: files, and nothing that only looks like one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from advalign.errors import UserError
from advalign.runtime.files import digest, digest_of_file, full_path, read_content, write_atomically


def test_a_file_is_read_whole(tmp_path: Path):
    (tmp_path / "a").write_bytes(b"12")
    assert read_content(tmp_path / "a") == b"12"
    assert digest_of_file(tmp_path / "a") == digest(b"12")


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", "folder", "circle", "nothing", "x" * 300):
        with pytest.raises(UserError, match="cannot read "):
            read_content(tmp_path / name)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced_by_one(make: Callable[[Path], None], tmp_path: Path):
    make(tmp_path / "there")
    before = (tmp_path / "there").lstat()
    with pytest.raises(UserError, match="it is there and no file"):
        write_atomically(tmp_path / "there", "text")
    assert (tmp_path / "there").lstat() == before
    assert [file.name for file in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("path", ["circle", "~nobody-of-this-name/x", "a\0b"])
def test_paths_that_lead_nowhere(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    with pytest.raises(UserError, match="cannot use "):
        full_path(path)
