"""Sealed files: each carries a format version, what it belongs to, and a checksum over every byte, checked when read.

The seal is a line of JSON at a place that the file's own format leaves free, so that other programs read the file as
before: the comment of a zip archive (`.pt`, `.npz`), the metadata of safetensors, or what follows the array of a `.npy`
file. The checksum is the SHA-256 of the whole file with the checksum's own digits as zeros.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from advalign.errors import UserError

SEAL_FORMAT = 1
"""Raised when a newer program writes what this one cannot read."""

_BLANK = "0" * 64
_BEGIN_OF_ZIP = b"PK"
_END_OF_ZIP = b"PK\x05\x06"  # begins the last record of a zip archive, 22 bytes and the comment
_ZIP_TAIL = 22
_BEGIN_OF_NPY = b"\x93NUMPY"
_NPY_MARK = b"\nadvalign-seal "
_CHUNK = 1 << 22  # bytes read at once
_NPY_TAIL = 1024  # the seal of a .npy file lies within its last bytes

Content = bytes | mmap.mmap

_log = logging.getLogger("advalign")
_noted: set[str] = set()  # kinds of files


@dataclass(frozen=True)
class Owner:
    """What a file belongs to, and what a reader does about one that is damaged or another's."""

    belongs_to: str
    """An id: of a run, or the digest of what was asked for."""
    remedy: str
    """What to do, as the end of a sentence: `remove it, and the training starts again`."""


def seal_zip(content: bytes, owner: Owner) -> bytes:
    """Return a zip archive without comment (`torch.save`, `numpy.savez`) with the seal as its comment."""
    assert content[-_ZIP_TAIL : -_ZIP_TAIL + 4] == _END_OF_ZIP
    seal = _blank_seal(owner)
    return _signed(content[:-2] + len(seal).to_bytes(2, "little") + seal)


def seal_safetensors(tensors: dict[str, Tensor], metadata: dict[str, str], owner: Owner) -> bytes:
    """Return a safetensors file with the seal among its metadata; the same bytes for the same content."""
    from safetensors.torch import save

    content = save(tensors, metadata={**metadata, "seal": _blank_seal(owner).decode()})
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes them in any order
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    return _signed(len(text).to_bytes(8, "little") + text + content[8 + length :])


def seal_npy(file: BinaryIO, owner: Owner) -> None:
    """Add the seal to a `.npy` file, open for reading and writing, whose array is whole."""
    file.seek(0, 2)
    at = file.tell() + len(_NPY_MARK) + _blank_seal(owner).rindex(_BLANK.encode())
    file.write(_NPY_MARK + _blank_seal(owner))
    file.flush()
    checksum = _checksum_of_file(file, at)
    file.seek(at)
    file.write(checksum.encode())


def check_sealed(content: Content, file: Path, owner: Owner | None, *, remedy: str = "") -> bool:
    """Check a file's content against its seal; return whether it has one.

    A file of an earlier version without a seal is believed, and a note says so.

    Args:
        content: all bytes of the file.
        owner: what it has to belong to; None if it may be anybody's.
        remedy: what to do about a damaged one, where it has no owner.

    Raises:
        UserError: it is damaged, of a newer version, or belongs to something else.
    """
    remedy = owner.remedy if owner is not None else remedy
    damaged = UserError(f"{file} is damaged, its checksum does not fit: {remedy}")
    try:
        text = _find(content)
    except ValueError:
        raise damaged from None
    if text is None:
        return False
    seal = _read(text, damaged)
    at = content.rfind(seal["sha256"].encode())
    if at < 0 or _checksum(content, at) != seal["sha256"]:
        raise damaged
    _check_owner(seal, file, owner)
    return True


def check_sealed_npy(path: Path, owner: Owner) -> None:
    """Check a `.npy` file against its seal, part by part: it may be larger than what can be mapped into memory.

    Raises:
        OSError: it cannot be read.
        UserError: as `check_sealed`, and for a file without a seal.
    """
    damaged = UserError(f"{path} is damaged, its checksum does not fit: {owner.remedy}")
    with path.open("rb") as file:
        first = max(0, os.fstat(file.fileno()).st_size - _NPY_TAIL)
        tail = os.pread(file.fileno(), _NPY_TAIL, first)
        _, mark, text = tail.rpartition(_NPY_MARK)
        if not mark:
            raise damaged
        seal = _read(text.decode(errors="replace"), damaged)
        at = tail.rfind(seal["sha256"].encode())
        if at < 0 or _checksum_of_file(file, first + at) != seal["sha256"]:
            raise damaged
    _check_owner(seal, path, owner)


def note_unsealed(file: Path) -> None:
    """Note that a file of the library has no checksum; once for all files of a kind."""
    if file.suffix not in _noted:
        _noted.add(file.suffix)
        _log.warning("note: %s has no checksum, like all files of earlier versions; it is read as it is", file)


def _blank_seal(owner: Owner) -> bytes:
    return json.dumps({"format": SEAL_FORMAT, "belongs_to": owner.belongs_to, "sha256": _BLANK}).encode()


def _signed(content: bytes) -> bytes:
    at = content.rfind(_BLANK.encode())
    return content[:at] + _checksum(content, at).encode() + content[at + len(_BLANK) :]


def _checksum(content: Content, at: int) -> str:
    """Return the SHA-256 of the content with zeros for the digits that begin at a byte."""
    view, total = memoryview(content), hashlib.sha256()
    for part in (view[:at], _BLANK.encode(), view[at + len(_BLANK) :]):
        total.update(part)
    return total.hexdigest()


def _checksum_of_file(file: BinaryIO, at: int) -> str:
    """Return `_checksum` of an open file, of which a part at a time is in memory."""
    total, end = hashlib.sha256(), os.fstat(file.fileno()).st_size
    for first, last in ((0, at), (at + len(_BLANK), end)):
        for begins in range(first, last, _CHUNK):
            total.update(os.pread(file.fileno(), min(_CHUNK, last - begins), begins))
        if first == 0:
            total.update(_BLANK.encode())
    return total.hexdigest()


def _check_owner(seal: dict[str, Any], file: Path, owner: Owner | None) -> None:
    if seal["format"] > SEAL_FORMAT:
        raise UserError(
            f"{file} was written by a newer version of advalign (format {seal['format']}): upgrade advalign"
        )
    if owner is not None and seal["belongs_to"] != owner.belongs_to:
        raise UserError(f"{file} belongs to {seal['belongs_to']}, not to {owner.belongs_to}: {owner.remedy}")


def _find(content: Content) -> str | None:
    """Return the seal's text, or None where there is none; ValueError if the place for it is damaged."""
    if content[:2] == _BEGIN_OF_ZIP:
        at = content.rfind(_END_OF_ZIP, max(0, len(content) - _ZIP_TAIL - 2**16))
        comment = content[at + _ZIP_TAIL :]
        if not 0 <= at <= len(content) - _ZIP_TAIL or int.from_bytes(
            content[at + _ZIP_TAIL - 2 : at + _ZIP_TAIL], "little"
        ) != len(comment):
            raise ValueError
        return comment.decode() or None
    if content[:6] == _BEGIN_OF_NPY:  # only caches, which are made anew where they have none
        at = content.rfind(_NPY_MARK, max(0, len(content) - _NPY_TAIL))
        if at < 0:
            raise ValueError
        return content[at + len(_NPY_MARK) :].decode()
    return _seal_in_metadata(content)


def _seal_in_metadata(content: Content) -> str | None:
    """Return the seal in the header of safetensors: 8 bytes of length, then JSON."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise ValueError
    if isinstance(seal := metadata.get("seal"), str):
        return seal
    # Without a seal: a file from elsewhere or of an earlier version, unless the seal's own name is what is damaged.
    fields = {"dtype", "shape", "data_offsets"}
    tensors = all(isinstance(each, dict) and each.keys() == fields for each in header.values())
    if not tensors or ("card" in metadata and len(metadata) > 1):
        raise ValueError
    return None


def _read(text: str, damaged: UserError) -> dict[str, Any]:
    try:
        seal = json.loads(text)
        known = isinstance(seal, dict) and {"format": int, "belongs_to": str, "sha256": str}
        if not known or not all(isinstance(seal.get(key), kind) for key, kind in known.items()):
            raise damaged
        if len(seal["sha256"]) != len(_BLANK):
            raise damaged
    except ValueError:
        raise damaged from None
    return seal
