"""Arrays in archives that lie: what a header says is checked against what the file can hold."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from advalign.data import load, load_extra
from advalign.data.npy import read_array
from advalign.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 5, 4), np.uint8)
LABELS = np.arange(12) % 3


def npy(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def header(shape: Any, descr: Any = "|u1") -> bytes:
    text = str({"descr": descr, "fortran_order": False, "shape": shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def archive(folder: Path, images: bytes, labels: bytes, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(folder / "mine.npz", "w", compression) as file:
        file.writestr("x_train.npy", images)
        file.writestr("y_train.npy", labels)
    return folder / "mine.npz"


READERS: dict[str, Callable[[Path], object]] = {
    "npz": lambda path: load(f"npz:{path}"),
    "extra": lambda path: load_extra(path, (1, 5, 4), 3, "toy"),
}


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "member",
    [
        b"",
        b"no array",
        b'{"a": 1}',
        header((10**9, 5, 4)),
        header((10**18, 5, 4)),
        header((10**30, 5, 4)),
        header((-12, 5, 4)) + bytes(240),
        header((12, 5, 4))[:20],
        header((12, 5, 4)) + bytes(239),
        header((12, 5, 4), "|O") + bytes(240),
        header((12, 5, 4), "nothing") + bytes(240),
        header("(" * 90),
        npy(np.array([{"a": 1}], dtype=object)),
        npy(np.array(["a", "b"])),
        b"\x93NUMPY\x09\x00" + bytes(300),
    ],
    ids=lambda member: str(member[:20]) + str(len(member)),
)
def test_members_that_lie_are_refused_with_file_and_array(tmp_path: Path, reader: str, compression: int, member: bytes):
    for images, labels, name in ((member, npy(LABELS), "x_train"), (npy(IMAGES), member, "y_train")):
        with pytest.raises(UserError) as caught:
            READERS[reader](archive(tmp_path, images, labels, compression))
        message = str(caught.value)
        assert name in message
        assert "mine.npz" in message
        assert "\n" not in message
        assert len(message) < 600


@pytest.mark.parametrize("reader", READERS)
def test_an_empty_archive_is_refused(tmp_path: Path, reader: str):
    with zipfile.ZipFile(tmp_path / "mine.npz", "w"):
        pass
    with pytest.raises(UserError, match=r"mine\.npz.*x_train"):
        READERS[reader](tmp_path / "mine.npz")


def test_what_unpacks_to_more_than_is_allowed_is_refused_before_it_is_read(tmp_path: Path):
    path = archive(tmp_path, npy(np.zeros((64, 256, 256), np.uint8)), npy(LABELS))
    assert path.stat().st_size < 20_000
    with zipfile.ZipFile(path) as file:
        assert read_array(file, "x_train", "mine.npz", most=4 << 20).shape == (64, 256, 256)
        with pytest.raises(UserError, match=r"mine.npz: x_train has 4 MiB, and this machine 3 MiB of memory"):
            read_array(file, "x_train", "mine.npz", most=(4 << 20) - 1)


def test_what_the_disk_cannot_hold_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("advalign.data.extra.disk_usage", lambda path: SimpleNamespace(free=100))
    with pytest.raises(UserError, match=r"cannot be unpacked to .*: free 0 MiB there.*has not that much"):
        load_extra(archive(tmp_path, npy(IMAGES), npy(LABELS)), (1, 5, 4), 3, "toy")
