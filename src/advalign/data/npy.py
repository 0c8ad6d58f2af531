"""Arrays in `.npz` archives: their headers are read, and believed only as far as the file can hold what they say."""

from __future__ import annotations

import math
import warnings
import zipfile
from dataclasses import dataclass

import numpy as np

from advalign.errors import UserError, require, shorten


@dataclass(frozen=True)
class Header:
    """What an array says of itself."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    begins: int
    """Where its content begins in the unpacked member."""

    @property
    def size(self) -> int:
        """Bytes of the content."""
        return self.dtype.itemsize * math.prod(self.shape)


def read_header(archive: zipfile.ZipFile, name: str, source: str) -> Header:
    """Read the header of an array, and check it against the size of its member of the archive.

    Args:
        source: the name of the file in the errors.

    Raises:
        UserError: it is no array, holds Python objects, or is shorter than it says.
    """
    member = f"{name}.npy"
    try:
        with archive.open(member) as file, warnings.catch_warnings(action="ignore"):  # of headers that Python 2 wrote
            version = np.lib.format.read_magic(file)
            known = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            require(version in known, lambda: f"{source}: {name} is of the unknown .npy version {version}")
            header = Header(*known[version](file), file.tell())
    except UserError:
        raise
    except Exception as error:  # of zipfile, its decompressors, and numpy, which reads the header as Python
        reason = shorten(" ".join(str(error).split()))
        raise UserError(f"{source} cannot be read: {name} is no array, or is damaged: {reason}") from error
    require(
        not header.dtype.hasobject,
        lambda: (
            f"{source} cannot be read: {name} has object values, which need allow_pickle: save numbers, of one "
            "shape each, or texts as with .astype(str)"
        ),
    )
    require(
        all(length >= 0 for length in header.shape)
        and header.begins + header.size <= archive.getinfo(member).file_size,
        lambda: f"{source}: {name} is cut short: it has shape {header.shape}, and no content for that",
    )
    return header


def read_array(archive: zipfile.ZipFile, name: str, source: str, most: int) -> np.ndarray:
    """Read an array whole, after its header.

    Args:
        most: bytes that are allowed; a packed member can be a thousand times larger than its file.

    Raises:
        UserError: as `read_header`; it is larger than that; or the content is damaged.
    """
    header = read_header(archive, name, source)
    require(
        header.size <= most,
        lambda: f"{source}: {name} has {header.size >> 20} MiB, and this machine {most >> 20} MiB of memory",
    )
    try:
        with archive.open(f"{name}.npy") as file, warnings.catch_warnings(action="ignore"):
            return np.lib.format.read_array(file, allow_pickle=False)
    except MemoryError as error:
        raise UserError(f"{source}: {name} has {header.size >> 20} MiB, for which there is no memory") from error
    except Exception as error:
        raise UserError(f"{source} cannot be read: {name}: {shorten(' '.join(str(error).split()))}") from error
