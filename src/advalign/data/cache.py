"""Where the library keeps what it downloads and decodes, and arrays that are made once, row by row, and kept there."""

from __future__ import annotations

import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from math import prod
from pathlib import Path
from shutil import disk_usage
from typing import BinaryIO, Generic, TypeVar

import numpy as np

from advalign.errors import UserError
from advalign.runtime.files import lock_exclusively, write_atomically, written_atomically
from advalign.runtime.memory import readable_size
from advalign.runtime.sealed import Owner, check_sealed_npy, seal_npy

T = TypeVar("T")

_SAVE_SECONDS = 10.0
_TOGETHER = 4 << 20  # bytes of rows that a thread makes before it hands them over


def cache_folder() -> Path:
    """Return the folder ADVALIGN_CACHE names, or the operating system's place for caches; it need not exist yet."""
    import pooch

    return Path(os.environ.get("ADVALIGN_CACHE") or pooch.os_cache("advalign"))


@dataclass(frozen=True)
class Rows(Generic[T]):
    """How the rows of an array are made: each of its own item, several at a time."""

    task: str
    """What making them is called beside its progress bar."""
    shape: tuple[int, ...]
    """Of the array; the rows are along the first axis."""
    dtype: type[np.generic]
    items: Callable[[int], Iterable[T]]
    """Yields the items from a row number on."""
    make: Callable[[T], bytes]
    """Makes the bytes of a row."""

    @property
    def row_size(self) -> int:
        """Bytes of a row."""
        return prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    @property
    def header(self) -> bytes:
        """What a `.npy` file of the array begins with."""
        content = BytesIO()
        described = np.lib.format.dtype_to_descr(np.dtype(self.dtype))
        header = {"descr": described, "fortran_order": False, "shape": self.shape}
        np.lib.format.write_array_header_1_0(content, header)
        return content.getvalue()

    def made(self, first: int) -> Iterator[bytes]:
        """Yield the rows from a number on, in order, made by as many threads as there are processors."""
        workers, together = _processors(), max(1, min(64, _TOGETHER // max(1, self.row_size)))
        items, waiting = iter(self.items(first)), deque[Future[list[bytes]]]()
        with ThreadPoolExecutor(workers, "advalign-cache") as threads:
            try:
                while chunk := list(islice(items, together)):
                    waiting.append(threads.submit(lambda each: [self.make(item) for item in each], chunk))
                    if len(waiting) > 2 * workers:
                        yield from waiting.popleft().result()
                while waiting:
                    yield from waiting.popleft().result()
            finally:
                threads.shutdown(cancel_futures=True)


def cached_array(name: str, rows: Rows[T]) -> np.ndarray:
    """Return an array from the cache, mapped into memory; made if it is not there or is damaged.

    Args:
        name: of its file, which must name all that the array depends on.
        rows: how it is made; what an interrupt or a kill has left of it is gone on with.

    Raises:
        UserError: the cache cannot be written or read.
    """
    file = cache_folder() / name
    with _named(file):
        _make_unless(lambda: _is_whole(file) and _begins_with(file, rows.header), file, rows)
        return np.load(file, mmap_mode="c")  # copy-on-write: torch wants writable memory, and the file stays as it is


def cached_file(name: str, rows: Rows[T], checked_by: str) -> tuple[Path, int]:
    """Return the file of an array in the cache and where its first row begins; made if it is not there.

    Its content, which may be larger than the memory, is checked against its seal where there is no whole table of
    digests, by which it is checked as it is read; else its size and header are.

    Args:
        name, rows: as in `cached_array`.
        checked_by: the name of that table in the cache; it is removed when the array is made.

    Raises:
        UserError: the cache cannot be written or read.
    """
    file, header = cache_folder() / name, rows.header
    size, table = len(header) + rows.row_size * rows.shape[0], cache_folder() / checked_by

    def is_there() -> bool:
        known = file.is_file() and file.stat().st_size >= size and _begins_with(file, header)
        return known and (_is_whole(table) or _is_whole(file))

    with _named(file):
        if not is_there():
            table.unlink(missing_ok=True)
        _make_unless(is_there, file, rows)
    return file, len(header)


def cached_table(name: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """Return an array of any length from the cache; made whole if it is not there or is damaged.

    Raises:
        UserError: the cache cannot be written or read.
    """
    file = cache_folder() / name
    with _named(file):
        if not _is_whole(file):
            table = make()
            with written_atomically(file) as draft:
                np.save(draft, table)
                seal_npy(draft, _owner(file))
        return np.load(file)


def remembered(name: str, make: Callable[[], str]) -> str:
    """Return hexadecimal digits that are kept in the cache under a name; made where they are not there."""
    file = cache_folder() / f"{name}.txt"
    if file.is_file() and re.fullmatch("[0-9a-f]+", text := file.read_text(errors="replace")):
        return text
    text = make()
    with _named(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)
    return text


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Name the file in what goes wrong with it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"the image cache {file} cannot be used: free space, delete it, or set ADVALIGN_CACHE to "
            f"another folder ({error})"
        ) from error


def _is_whole(file: Path) -> bool:
    """Tell whether the file is there and undamaged; one that is not is made anew."""
    if not file.is_file():
        return False
    try:
        check_sealed_npy(file, _owner(file))
    except UserError:
        return False
    return True


def _begins_with(file: Path, header: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(header)) == header


def _owner(file: Path) -> Owner:
    return Owner(file.name, "remove it")


def _make_unless(is_there: Callable[[], bool], file: Path, rows: Rows[T]) -> None:
    """Make a file, sealed, unless it is there; it has its name when it is whole.

    Until then its rows lie beside it. What an interrupt, a kill or a full disk leaves stays, with the number of rows
    that the disk is known to have; what another failure leaves is removed.
    """
    if is_there():
        return
    if file.exists() and not file.is_file():  # os.replace would put a file in the place of a device
        raise OSError("it is there and no file")
    file.parent.mkdir(parents=True, exist_ok=True)
    part, mark = (file.with_name(f".{file.name}.{suffix}") for suffix in ("part", "rows"))
    with lock_exclusively(part) as draft:
        try:
            if not is_there():  # another process may have made it, while this one waited
                _require_room(draft, rows)
                _fill(draft, mark, rows)
                seal_npy(draft, _owner(file))
                draft.flush()
                os.fsync(draft.fileno())
                os.replace(part, file)
        except Exception as error:
            if not (isinstance(error, OSError) and mark.is_file()):
                part.unlink(missing_ok=True)
                mark.unlink(missing_ok=True)
            raise
        part.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)


def _require_room(draft: BinaryIO, rows: Rows[T]) -> None:
    """Refuse to begin what the disk cannot hold, beside what it already has of it."""
    needed = len(rows.header) + rows.row_size * rows.shape[0] - os.fstat(draft.fileno()).st_size
    free = disk_usage(draft.fileno()).free
    if needed > free:
        raise OSError(f"it takes {readable_size(needed)} more, and {readable_size(free)} are free")


def _fill(draft: BinaryIO, mark: Path, rows: Rows[T]) -> None:
    """Write the header and all rows, from the last one on of which the disk is known to have those before."""
    from rich.console import Console

    from advalign.runtime.progress import progress_bars

    header, total = rows.header, rows.shape[0]
    done = _done(draft, mark, header, rows.row_size)
    draft.seek(0)
    draft.truncate(len(header) + done * rows.row_size if done else 0)
    if not done:
        draft.write(header)
    draft.seek(0, os.SEEK_END)
    saved = time.monotonic()
    with progress_bars(Console(stderr=True), "images") as bars:
        task = bars.add_task(rows.task, total=total, completed=done)
        try:
            for row in rows.made(done):  # written, not memory-mapped: on a full disk a mapping ends with SIGBUS
                draft.write(row)
                done += 1
                bars.advance(task)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    _note(draft, mark, done)
                    saved = time.monotonic()
        except KeyboardInterrupt:
            _note(draft, mark, done)
            raise
    assert done == total


def _note(draft: BinaryIO, mark: Path, done: int) -> None:
    """Bring the rows to the disk, and then their number."""
    draft.flush()
    os.fsync(draft.fileno())
    with written_atomically(mark) as file:
        file.write(str(done).encode())


def _done(draft: BinaryIO, mark: Path, header: bytes, row_size: int) -> int:
    """Return how many rows a draft has for sure; none if it is another array's."""
    draft.seek(0)
    if draft.read(len(header)) != header or not mark.is_file():
        return 0
    noted = mark.read_text(errors="replace")
    within = (os.fstat(draft.fileno()).st_size - len(header)) // row_size
    return int(noted) if noted.isdecimal() and int(noted) <= within else 0


def _processors() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
