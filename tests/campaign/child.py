"""A command in a child process: forked, so that torch is imported once, and killed or starved as a trial asks."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

TIMEOUT = 120.0
MEMORY = 12 << 30  # bytes of address space; torch alone maps a few


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    """Exit code; minus the signal's number where one ended it; 124 where it took too long."""
    out: str
    err: str
    seconds: float

    @property
    def has_traceback(self) -> bool:
        """Whether it ended in what only its author can read."""
        return "Traceback (most recent call last)" in self.out + self.err or self.code == 70

    @property
    def is_one_line(self) -> bool:
        """Whether it refused the input as every command does: exit code 2, and one line that says why."""
        lines = [line for line in self.err.splitlines() if not line.startswith("note: ")]
        return self.code == 2 and len(lines) == 1 and lines[0].startswith("advalign: error: ")


@dataclass(frozen=True)
class Trouble:
    """What befalls a command under way."""

    signal: int = 0
    """sent after `after` seconds; 0 for none"""
    after: float = 0.0
    full_at: int = 0
    """the number of the flush to disk at which the disk is full, from 1; 0 for never"""
    dies_at: int = 0
    """the number of the flush to disk right after which it is killed, from 1; 0 for never"""
    largest: int = 0
    """bytes of the largest file that the disk has room for; 0 for no limit"""
    twin: bool = False
    """whether the same command is started twice at the same time"""

    def __str__(self) -> str:
        return self._happening() + (" beside its twin" if self.twin else "")

    def _happening(self) -> str:
        if self.dies_at:
            return f"SIGKILL after flush {self.dies_at}"
        if self.full_at:
            return f"disk full at flush {self.full_at}"
        if self.largest:
            return f"disk full at byte {self.largest} of a file"
        return f"{signal.Signals(self.signal).name} after {self.after:.2f} s" if self.signal else "nothing"


CALM = Trouble()


def run(arguments: Sequence[str], folder: Path, trouble: Trouble = CALM, timeout: float = TIMEOUT) -> Outcome:
    """Run `advalign ARGUMENTS` in a folder and wait for its end."""
    return Child(arguments, folder, trouble).wait(timeout)


class Child:
    """`advalign ARGUMENTS` under way in a folder.

    Args:
        name: keeps its output apart from that of another child in the same folder.
    """

    def __init__(self, arguments: Sequence[str], folder: Path, trouble: Trouble, name: str = "") -> None:
        self.files, self.trouble = [folder / f".campaign-{stream}{name}" for stream in ("out", "err")], trouble
        self.began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.id = os.fork()
        if self.id == 0:
            _command(list(arguments), folder, self.files, trouble)  # does not return

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        """Send the signal of its trouble when it is time, and wait for the end."""
        code = self._wait(timeout)
        out, err = (file.read_text(errors="replace") if file.exists() else "" for file in self.files)
        for file in self.files:
            file.unlink(missing_ok=True)
        return Outcome(code, out, err, time.monotonic() - self.began)

    def _wait(self, timeout: float) -> int:
        pending = self.trouble.signal
        while True:
            done, status = os.waitpid(self.id, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            now = time.monotonic() - self.began
            if pending and now >= self.trouble.after:
                os.kill(self.id, pending)
                pending = 0
            if now > timeout:
                os.kill(self.id, signal.SIGKILL)
                os.waitpid(self.id, 0)
                return 124
            time.sleep(0.002)


def _command(arguments: list[str], folder: Path, files: list[Path], trouble: Trouble) -> None:
    """Be the command: nothing of the parent's is left but the modules that it has imported."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        if trouble.largest:
            resource.setrlimit(resource.RLIMIT_FSIZE, (trouble.largest, trouble.largest))
        os.environ.update(ADVALIGN_CACHE=str(folder / "cache"), COLUMNS="200")
        sys.argv = ["advalign", *arguments]
        if trouble.full_at or trouble.dies_at:
            _watch_disk(trouble)
        _save_at_once()
        from advalign.cli.commands import main

        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError):
                code = code or 74
        os._exit(code)


def _watch_disk(trouble: Trouble) -> None:
    """Let the disk be full from one flush on, so that what is written does not reach it, or die after one."""
    real, flushes = os.fsync, 0

    def fsync(handle: int) -> None:
        nonlocal flushes
        flushes += 1
        if trouble.full_at and flushes >= trouble.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)
        if flushes == trouble.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = fsync


def _save_at_once() -> None:
    """Let evaluations save after every batch and not at most every ten seconds, so that kills find states."""
    from advalign.evaluation import state

    state.SAVE_SECONDS = -1.0
