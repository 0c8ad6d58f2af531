"""Locks between processes; the system frees them at any death."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from advalign.errors import UserError


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Hold a lock file.

    Args:
        timeout: seconds to wait for another process; as long as it takes if negative.

    Raises:
        filelock.Timeout: another process holds it after that time.
        UserError: the file cannot be made or opened.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise
    except OSError as error:
        raise UserError(f"cannot lock {path}: {error.strerror}; remove it, or make it writable") from None
    try:
        yield
    finally:
        lock.release()
