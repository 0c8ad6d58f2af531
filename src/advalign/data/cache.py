"""Where the library keeps what it downloads and decodes, and arrays that are made once and mapped from there."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from advalign.errors import UserError
from advalign.runtime.files import written_atomically
from advalign.runtime.sealed import Owner, check_sealed, seal_npy


def cache_folder() -> Path:
    """Return the folder ADVALIGN_CACHE names, or the operating system's place for caches; it need not exist yet."""
    import pooch

    return Path(os.environ.get("ADVALIGN_CACHE") or pooch.os_cache("advalign"))


def cached_array(
    name: str, dtype: type[np.generic], shape: tuple[int, ...], rows: Callable[[], Iterable[bytes]]
) -> np.ndarray:
    """Return an array from the cache, mapped into memory; made row by row if it is not there or is damaged.

    Args:
        name: of its file, which must name all that the array depends on.
        rows: makes the bytes of the rows, one after another.

    Raises:
        UserError: the cache cannot be written or read.
    """
    file = cache_folder() / name
    try:
        array = _mapped(file) if _is_whole(file) else None
        if array is None or array.shape != shape or array.dtype != dtype:
            _write(file, dtype, shape, rows())
            array = _mapped(file)
        return array
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"the image cache {file} cannot be used: free space, delete it, or set ADVALIGN_CACHE to "
            f"another folder ({error})"
        ) from error


def _is_whole(file: Path) -> bool:
    """Tell whether the file is there and undamaged; one that is not is made anew."""
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return check_sealed(content, file, _owner(file))
        except UserError:
            return False


def _mapped(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="c")  # copy-on-write: torch wants writable memory, and the file stays as it is


def _owner(file: Path) -> Owner:
    return Owner(file.name, "remove it")


def _write(file: Path, dtype: type[np.generic], shape: tuple[int, ...], rows: Iterable[bytes]) -> None:
    """Write the file, whole or not at all, and sealed."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with written_atomically(file) as draft:
        np.lib.format.write_array_header_1_0(draft, header)
        for row in rows:  # written, not memory-mapped: on a full disk a mapping ends the process with SIGBUS
            draft.write(row)
        seal_npy(draft, _owner(file))
