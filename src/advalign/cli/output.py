"""Standard output of a command: where nothing reads it any more, the work goes on, and standard error says so."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, TextIO, cast

from advalign.errors import UserError

_NOBODY_READS = (errno.EPIPE, errno.EIO)  # the pipe's reader has ended; the terminal is closed


class _Output:
    """A text stream that goes on, into nothing, when nobody reads it any more.

    What its encoding cannot write, such as ± where a terminal is plain ASCII, it writes as an escape.
    """

    def __init__(self, stream: TextIO, notice: str) -> None:
        self._stream, self._notice = stream, notice
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._go_on(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._go_on(error)

    def _go_on(self, error: OSError) -> None:
        discard(self._stream)
        if error.errno not in _NOBODY_READS:
            raise UserError(f"cannot write to standard output: {error.strerror}") from None
        if self._notice:
            complain(self._notice)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_output(notice: str) -> Iterator[None]:
    """Within the context, a closed pipe or terminal ends standard output and not the command.

    Args:
        notice: what standard error then says; nothing if empty.

    Raises:
        UserError: standard output cannot be written for another reason, such as a full disk.
    """
    stream = sys.stdout
    if stream is None:  # the caller has closed it
        yield
        return
    sys.stdout = cast("TextIO", _Output(stream, notice))
    try:
        yield
        sys.stdout.flush()
    except SystemExit:  # after --help
        sys.stdout.flush()
        raise
    finally:
        sys.stdout = stream


def complain(line: str) -> None:
    """Print a line on standard error, if anybody reads it."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIO) -> None:
    """Send what a stream still holds, and all that comes, to nowhere: the interpreter flushes it at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
