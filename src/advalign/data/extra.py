"""Generated images in an `.npz` file of any size: mapped into memory, and read row by row as batches draw them."""

from __future__ import annotations

import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from shutil import copyfileobj, disk_usage

import numpy as np
import torch

from advalign.data.cache import cache_folder
from advalign.data.images import Digests, Images, RowNumbers
from advalign.data.npy import Header, read_header
from advalign.errors import UserError, require
from advalign.runtime.files import digest_of_stream, full_path, written_atomically
from advalign.runtime.near import near_path

ARRAY_NAMES = ("image", "label"), ("x_train", "y_train")
"""What the arrays may be called: as in the files of Wang et al. 2023, or as in `npz:PATH`."""
SAMPLED = 1024
"""Images that the digest looks at; 50 million would take minutes."""
_CHUNK = 1 << 20
_ROWS = 4096  # images in memory at once


@dataclass(frozen=True, eq=False)
class Extra:
    """Images beside a data set's own, of the same shape and classes; they stay in their file until they are drawn."""

    pixels: np.ndarray
    """(N, C, H, W) uint8, a view of a memory map."""
    labels: np.ndarray
    """(N,) integers from 0, a memory map."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: RowNumbers) -> Images:
        """Return a copy of the images with these row numbers (n,), in this order, on the CPU."""
        rows = rows.cpu()
        ascending = rows.argsort(stable=True)  # a disk likes to read forwards
        places = ascending.argsort(stable=True)
        at = rows[ascending].numpy()
        pixels, labels = np.array(self.pixels[at]), self.labels[at].astype(np.int64)
        return Images(torch.from_numpy(pixels)[places], torch.from_numpy(labels)[places])

    @cached_property
    def digests(self) -> Digests:
        """Digests (N,) as `Images.digests`; every image is read for them, which takes seconds for each million."""
        parts = [torch.arange(first, min(first + _ROWS, len(self))) for first in range(0, len(self), _ROWS)]
        return np.concatenate([self.take(rows).digests for rows in parts])

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 over the shape, all labels, and 1,024 images at equal distances."""
        rows = np.linspace(0, len(self) - 1, min(SAMPLED, len(self))).astype(int)
        labels = (self.labels[first : first + _CHUNK].astype("<i8").tobytes() for first in range(0, len(self), _CHUNK))
        images = (self.pixels[row].tobytes() for row in rows)
        return digest_of_stream(chain([repr(self.pixels.shape)], labels, images))


def find_npz(path: Path | str) -> Path:
    """Return the full path of an `.npz` file.

    Raises:
        UserError: there is none.
    """
    path = full_path(path)
    require(path.is_file(), lambda: f"extra data {path}: there is no such file{near_path(path)}")
    require(zipfile.is_zipfile(path), lambda: f"extra data {path} is not an .npz file, or is cut short")
    return path


def load_extra(path: Path | str, shape: tuple[int, int, int], classes: int, name: str) -> Extra:
    """Map an `.npz` file of generated images into memory: `image` and `label`, or `x_train` and `y_train`.

    Images are uint8, of shape (N, H, W, C) or (N, C, H, W), with one channel also (N, H, W); labels are integers below
    `classes`, of shape (N,). What `numpy.savez` has stored is mapped where it lies. What `numpy.savez_compressed` has
    packed is unpacked once, chunk by chunk, to the cache, under the name of its size and checksum, and mapped there.

    Args:
        path: the file.
        shape: of the data set's images, (C, H, W).
        classes: the number of the data set's classes.
        name: the data set's, for the errors.

    Raises:
        UserError: whatever of this does not hold, or a cache that cannot be written.
    """
    path = find_npz(path)
    try:
        with zipfile.ZipFile(path) as archive:
            files = archive.namelist()
            pairs = [pair for pair in ARRAY_NAMES if all(f"{key}.npy" in files for key in pair)]
            require(
                bool(pairs),
                lambda: f"extra data {path} must hold image and label, or x_train and y_train, not {_list(files)}",
            )
            images, labels = (_Member.read(archive, key, path) for key in pairs[0])
            _check_images(images, shape, name)
            _check_labels(labels, images)
            extra = Extra(_channels_first(images.map(archive), shape), labels.map(archive))
    except UserError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"extra data {path} cannot be read: {' '.join(str(error).split())}") from error
    for first in range(0, len(extra), _CHUNK):
        part = extra.labels[first : first + _CHUNK]
        wrong = part[(part < 0) | (part >= classes)]
        if len(wrong):
            raise UserError(f"{labels.label} has the label {wrong[0]}, but {name} has the classes 0 to {classes - 1}")
    return extra


@dataclass(frozen=True)
class _Member:
    """An array in an archive: what its header says, and where its content begins in the unpacked file."""

    info: zipfile.ZipInfo
    path: Path
    header: Header

    @classmethod
    def read(cls, archive: zipfile.ZipFile, name: str, path: Path) -> _Member:
        header = read_header(archive, name, f"extra data {path}")
        return cls(archive.getinfo(f"{name}.npy"), path, header)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.header.shape

    @property
    def dtype(self) -> np.dtype:
        return self.header.dtype

    @property
    def label(self) -> str:
        return f"extra data {self.path}: {self.info.filename.removesuffix('.npy')}"

    def map(self, archive: zipfile.ZipFile) -> np.ndarray:
        """Return the array as a read-only memory map."""
        if self.info.compress_type == zipfile.ZIP_STORED:
            file, begins = self.path, _content(self.path, self.info) + self.header.begins
        else:
            file, begins = _unpacked(archive, self.info), self.header.begins
        require(file.stat().st_size >= begins + self.header.size, lambda: f"{self.label} is cut short")
        return np.memmap(file, self.dtype, "r", begins, self.shape, "F" if self.header.fortran else "C")


def _content(path: Path, info: zipfile.ZipInfo) -> int:
    """Return where a member's bytes begin in the archive: behind its local header, name and extra field."""
    with path.open("rb") as file:
        file.seek(info.header_offset)
        *_, name, extra = struct.unpack("<4s22xHH", file.read(30))
    return info.header_offset + 30 + name + extra


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Path:
    """Return the unpacked member in the cache, writing it if it is not there."""
    cache = cache_folder() / f"extra-{info.CRC:08x}-{info.file_size:x}-{info.compress_size:x}.npy"
    if cache.is_file():
        return cache
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        if info.file_size > disk_usage(cache.parent).free:  # a packed array can be a thousand times its file
            raise OSError("the disk has not that much")
        with written_atomically(cache) as file, archive.open(info) as packed:  # which checks the sum at its end
            copyfileobj(packed, file, _CHUNK)
    except OSError as error:
        raise UserError(
            f"{archive.filename} cannot be unpacked to {cache}: free {info.file_size >> 20} MiB there, or set "
            f"ADVALIGN_CACHE to another folder ({error})"
        ) from error
    return cache


def _check_images(images: _Member, shape: tuple[int, int, int], name: str) -> None:
    channels, height, width = shape
    allowed = [(channels, height, width), (height, width, channels), *([(height, width)] if channels == 1 else [])]
    n, *each = images.shape or (0,)
    shapes = " or ".join(f"(N, {', '.join(map(str, one))})" for one in allowed)
    require(
        n > 0 and tuple(each) in allowed,
        lambda: f"{images.label} has shape {images.shape}, but with {name} it must be {shapes}",
    )
    require(
        images.dtype == np.uint8,
        lambda: f"{images.label} has {images.dtype} values; generated images are uint8, 0 to 255",
    )


def _check_labels(labels: _Member, images: _Member) -> None:
    require(
        labels.shape == images.shape[:1],
        lambda: (
            f"{labels.label} has shape {labels.shape}, but there are {images.shape[0]} images, with one label for each"
        ),
    )
    require(labels.dtype.kind in "iu", lambda: f"{labels.label} has {labels.dtype} values; labels are integers from 0")


def _channels_first(pixels: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Return a view of the images as (N, C, H, W)."""
    if pixels.ndim == 3:
        return pixels[:, None]
    return pixels if pixels.shape[1:] == shape else np.moveaxis(pixels, -1, 1)


def _list(files: list[str]) -> str:
    return ", ".join(file.removesuffix(".npy") for file in files) or "nothing"
