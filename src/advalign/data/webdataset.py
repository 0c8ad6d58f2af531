"""Images in tar archives as webdataset has them, `KEY.jpg` with `KEY.cls`; nothing is unpacked to the disk."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from advalign.data.cache import cached_table
from advalign.data.image_files import SUFFIXES
from advalign.data.images import Dataset
from advalign.data.records import Record, Records, load_records
from advalign.errors import UserError, require
from advalign.runtime.files import digest, full_path

_LABEL = ".cls"
_LONGEST = 9  # characters of a label


def load_webdataset(path: Path | str, size: int) -> Dataset:
    """Return the images in tar archives, of one or of all below a folder; split by their names (`files_of`).

    Of each key there is an image file and, with the suffix `.cls`, its label, an integer from 0 as text; other members
    are not read. Archives are not compressed, as images are read from their places in them. Where these are is looked
    up once and kept in the cache.

    Raises:
        UserError: an archive that cannot be read, an image without a label; as `load_records`.
    """
    return load_records("webdataset", full_path(path), ".tar", _open, (), size)


def _open(file: Path) -> Records:
    state = file.stat()
    name = f"tar-{digest(repr((str(file), state.st_size, state.st_mtime_ns)))}.npy"
    begins, sizes, labels = cached_table(name, partial(_index, file)).T
    require(
        bool(len(labels)), lambda: f"{file} has no images with labels: looked for KEY.jpg and the like with KEY.cls"
    )
    return Records(file, labels, lambda first: _images(file, begins[first:].tolist(), sizes[first:].tolist(), first))


def _index(file: Path) -> np.ndarray:
    """Return (N, 3): where each image begins, its size, and its label."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                key = str(path.parent / path.name.partition(".")[0])
                if member.isreg() and path.suffix.lower() in SUFFIXES:
                    require(key not in images, lambda: f"{file}: {key} has two images")
                    images[key] = member.offset_data, member.size
                elif member.isreg() and path.suffix == _LABEL:
                    labels[key] = _label(archive, member, file)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{file} cannot be read as an uncompressed tar archive: {error}") from None
    without = [key for key in images if key not in labels]
    require(not without, lambda: f"{file}: {without[0]} has no label, {without[0]}{_LABEL}")
    beyond = [key for key, (begins, size) in images.items() if begins + size > file.stat().st_size]
    require(not beyond, lambda: f"{file} is cut short: {beyond[0]} does not lie in it")
    return np.array([(*place, labels[key]) for key, place in images.items()], np.int64).reshape(-1, 3)


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, file: Path) -> int:
    content = archive.extractfile(member)
    text = content.read(_LONGEST).decode(errors="replace").strip() if content and member.size <= _LONGEST else ""
    require(text.isdecimal(), lambda: f"{file}: {member.name} is no label: an integer from 0, as text")
    return int(text)


def _images(file: Path, begins: list[int], sizes: list[int], first: int) -> Iterator[Record]:
    try:
        with file.open("rb") as opened:
            for row, (at, size) in enumerate(zip(begins, sizes, strict=True), first):
                opened.seek(at)
                yield f"{file}[{row}]", opened.read(size)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
