"""Seals: any flipped bit, another owner and a newer version are noticed; other programs read the files as before."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, load_file, save

from advalign.errors import UserError
from advalign.runtime import sealed
from advalign.runtime.sealed import Owner, check_sealed, seal_npy, seal_safetensors, seal_zip

OWNER = Owner("0123456789", "remove it, and it is made again")


def write_pt(file: Path) -> None:
    content = io.BytesIO()
    torch.save({"a": torch.arange(6.0), "b": {"c": [1, 2]}}, content)
    file.write_bytes(seal_zip(content.getvalue(), OWNER))


def write_npz(file: Path) -> None:
    content = io.BytesIO()
    np.savez(content, a=np.arange(6), b=np.eye(2))
    file.write_bytes(seal_zip(content.getvalue(), OWNER))


def write_safetensors(file: Path) -> None:
    card = json.dumps({"method": "at", "run": OWNER.belongs_to, "note": "Grüße"})
    file.write_bytes(seal_safetensors({"a": torch.arange(6.0), "b": torch.eye(2)}, {"card": card}, OWNER))


def write_npy(file: Path) -> None:
    with file.open("w+b") as opened:
        np.save(opened, np.arange(12).reshape(3, 4))
        seal_npy(opened, OWNER)


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.pt": write_pt, "a.npz": write_npz, "a.safetensors": write_safetensors, "a.npy": write_npy,
}  # fmt: skip


@pytest.fixture(params=WRITERS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    WRITERS[request.param](tmp_path / request.param)
    return tmp_path / request.param


def test_a_whole_file_passes(file: Path):
    assert check_sealed(file.read_bytes(), file, OWNER)
    assert check_sealed(file.read_bytes(), file, None)


def test_every_flipped_bit_is_noticed(file: Path):
    content = file.read_bytes()
    for at in range(len(content)):
        bit = 1 << (at % 8)
        flipped = content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :]
        with pytest.raises(UserError, match=r"is damaged, its checksum does not fit: remove it"):
            check_sealed(flipped, file, OWNER)


def test_every_truncation_is_noticed(file: Path):
    content = file.read_bytes()
    for length in range(len(content)):
        with pytest.raises(UserError, match="is damaged"):
            check_sealed(content[:length], file, OWNER)


def test_added_bytes_are_noticed(file: Path):
    with pytest.raises(UserError, match="is damaged"):
        check_sealed(file.read_bytes() + b"\0", file, OWNER)


def test_another_owner_is_named(file: Path):
    other = Owner("9876543210", "remove it, and it is made again")
    with pytest.raises(UserError, match="belongs to 0123456789, not to 9876543210: remove it, and it is made again"):
        check_sealed(file.read_bytes(), file, other)


def test_a_newer_version_says_to_upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sealed, "SEAL_FORMAT", 2)
    for name, write in WRITERS.items():
        write(tmp_path / name)
    monkeypatch.undo()
    for name in WRITERS:
        with pytest.raises(UserError, match=r"written by a newer version of advalign \(format 2\): upgrade"):
            check_sealed((tmp_path / name).read_bytes(), tmp_path / name, OWNER)


def test_other_programs_read_them(tmp_path: Path):
    for name, write in WRITERS.items():
        write(tmp_path / name)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["b"] == {"c": [1, 2]}
    assert np.load(tmp_path / "a.npz")["a"].tolist() == list(range(6))
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == list(range(6))
    for mode in (None, "c"):
        assert np.load(tmp_path / "a.npy", mmap_mode=mode).tolist() == np.arange(12).reshape(3, 4).tolist()


def test_files_without_a_seal_are_told_apart(tmp_path: Path):
    content = io.BytesIO()
    torch.save({"a": 1}, content)
    assert not check_sealed(content.getvalue(), tmp_path / "a.pt", OWNER)
    assert not check_sealed(save({"a": torch.ones(1)}), tmp_path / "a.safetensors", OWNER)
    assert not check_sealed(save({"a": torch.ones(1)}, {"card": "{}"}), tmp_path / "a.safetensors", OWNER)


def test_the_same_weights_are_the_same_bytes():
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.int64)}
    metadata = {"card": '{"names": "\u732b"}', "format": "pt"}
    files = {seal_safetensors(tensors, metadata, Owner("it", "")) for _ in range(20)}
    assert len(files) == 1
    (content,) = files
    read = load(content)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    begin = 8 + int.from_bytes(content[:8], "little")
    assert begin % 8 == 0
    assert json.loads(content[8:begin])["__metadata__"].items() >= metadata.items()
