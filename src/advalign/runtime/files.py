"""Files: written so that a reader sees the old content or the new, whenever the machine stops; and their digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from advalign.errors import UserError, require, shorten

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer


_DRAFT = ".draft"


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """Yield a temporary file beside the target; afterwards flush it to the disk and rename it over the target.

    Raises:
        OSError: the disk is full or the folder cannot be written; the target is as it was, as after any error inside.
    """
    if path.exists() and not path.is_file():  # os.replace would put a file in the place of a device
        raise OSError(errno.EINVAL, "it is there and no file")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent)
    file, name = _locked_draft(path)
    try:
        with file:  # and with it its lock, which ends after the draft has its final name
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(name, 0o666 & ~_umask())  # mkstemp's are the owner's alone
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _locked_draft(path: Path) -> tuple[BinaryIO, str]:
    """Make a temporary file beside the target and lock it, by which others see that its writer lives."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_DRAFT)
        with suppress(OSError):  # of a file system without locks, on which nothing counts as abandoned
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return os.fdopen(handle, "wb"), name
        os.close(handle)  # another process took it for abandoned, in the instant before the lock


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder; those of live processes are locked."""
    for draft in folder.glob(f".*.????????{_DRAFT}"):  # eight characters are mkstemp's
        with suppress(OSError), draft.open("rb") as file:  # removed meanwhile, locked, or another user's
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.unlink()


@contextmanager
def lock_exclusively(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading and writing, made if it is not there, and hold it until no other process does.

    Raises:
        OSError: it cannot be made or opened, or its file system has no locks, without which two would write at once.
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):  # else it has been given its name
                yield file
                return


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a whole file as `written_atomically` does.

    Raises:
        UserError: the disk is full or the folder cannot be written; the target is as it was.
    """
    try:
        with written_atomically(path) as file:
            # A file name that is no text, of another system, is written as an escape.
            file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    except OSError as error:
        reason = "no space left on the disk" if error.errno == errno.ENOSPC else error.strerror
        raise UserError(f"cannot write {path}: {reason}; what was there is unchanged") from None


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files that a kill has left of writing this file; for its only writer."""
    for name in (f".{path.name}.????????", f".{path.name}.????????{_DRAFT}"):  # earlier versions had no suffix
        for file in path.parent.glob(name):  # eight characters are mkstemp's; .log.jsonl.swp is vim's
            file.unlink(missing_ok=True)


def require_folder(path: Path) -> None:
    """Refuse a path that is not a folder and cannot become one; nothing is written.

    Raises:
        UserError: the path, or what it is to lie below, is a file or cannot be looked up.
    """
    try:
        nearest = next(each for each in (path, *path.absolute().parents) if each.exists() or each.is_symlink())
    except OSError as error:
        raise UserError(f"cannot use {shorten(str(path))}: {error.strerror}") from None
    require(nearest.is_dir(), lambda: f"{nearest} is not a folder; nothing was changed")


def present(path: Path) -> bool:
    """Tell whether something is in a place, be it a link that leads nowhere: then what was there is to be missed."""
    return os.path.lexists(path)


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be made or written to; nothing is left in it.

    Raises:
        UserError: as `require_folder`, or what the system says.
    """
    require_folder(folder)
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from None


def digest(*parts: str | Buffer, digits: int = 16) -> str:
    """Return hexadecimal digits of the SHA-256 over all parts, one after another: a name for their content."""
    return digest_of_stream(parts, digits=digits)


def digest_of_stream(parts: Iterable[str | Buffer], digits: int = 16) -> str:
    """Return `digest` of parts that need not be in memory all at once."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
    return total.hexdigest()[:digits]


def digest_of_file(path: Path) -> str:
    """Return sixteen hexadecimal digits that name a file's content.

    Raises:
        UserError: as `read_content`.
    """
    return digest(read_content(path))


def require_original(file: Path, seen: dict[str, Path], remedy: str) -> None:
    """Refuse a file with the content of another one: which of the two names is the right one, neither says.

    Args:
        seen: the files so far by their content; this one is added.

    Raises:
        UserError: both files.
    """
    first = seen.setdefault(digest_of_file(file), file)
    require(first == file, lambda: f"{file} is a copy of {first.name}: {remedy}")


def read_content(path: Path) -> bytes:
    """Return all bytes of a file.

    Raises:
        UserError: it cannot be read, or is no file; a pipe would be waited for.
    """
    try:
        require(path.is_file() or not path.exists(), lambda: f"cannot read {path}: it is no file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {shorten(str(path))}: {error.strerror}") from None


def full_path(path: Path | str) -> Path:
    """Return the path without `~`, `..` and links, so that it names the same file wherever the program runs.

    Raises:
        UserError: it leads nowhere: a circle of links, a user who does not exist, or a zero byte.
    """
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot use {shorten(str(path))}: {error}") from None


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")
