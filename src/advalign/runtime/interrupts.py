"""Stopping a run in good order: SIGTERM, Ctrl-C, a closed terminal, or a time budget that is used up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from advalign.errors import quoted, require

_LONGEST = 1e8  # seconds, of a time budget; timers of the system take not much more


class Interrupts:
    """Within the context, asks to stop become a flag that the training loop reads after each step.

    A second Ctrl-C stops at once.
    """

    def __init__(self, time_budget: float | None = None) -> None:
        self._deadline = None if time_budget is None else time.monotonic() + time_budget
        self._signal = ""
        self._previous: dict[int, object] = {}

    @property
    def reason(self) -> str:
        """Why to stop, or the empty string."""
        if not self._signal and self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time budget is used up"
        return self._signal

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in (signal.SIGTERM, signal.SIGINT, *_hang_up()):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = f"{signal.Signals(number).name} arrived"


@contextmanager
def stoppable(time_budget: float | None = None) -> Iterator[list[str]]:
    """Within the context, SIGTERM, SIGHUP, Ctrl-C and the end of the time raise `KeyboardInterrupt` with the reason.

    For work that may end at any instant and goes on all the same, such as an evaluation. `Interrupts` inside it, which
    waits for a good moment, comes first. Yields a list that gets the reason as well: in the middle of an import, the
    exception may make another one out of itself.
    """
    reasons: list[str] = []

    def stop(number: int, frame: FrameType | None) -> None:
        used_up = number == signal.SIGALRM
        reasons.append("the time budget is used up" if used_up else f"{signal.Signals(number).name} arrived")
        raise KeyboardInterrupt(reasons[-1])

    if threading.current_thread() is not threading.main_thread():
        yield reasons
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM, *_hang_up())
    previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        if time_budget is not None:
            signal.setitimer(signal.ITIMER_REAL, max(time_budget, 1e-6))  # 0 would be never
        yield reasons
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _hang_up() -> tuple[signal.Signals, ...]:
    """Return the signal of a closed terminal, unless nohup has asked to ignore it."""
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


def parse_duration(text: str) -> float:
    """Return the seconds that `90`, `45s`, `9m`, `2h` or `1h30m` spell.

    Raises:
        UserError: the text is no duration above zero.
    """
    units = {"h": 3600.0, "m": 60.0, "s": 1.0}
    seconds, number = 0.0, ""
    for letter in text.strip() + ("s" if text.strip()[-1:].isdecimal() else ""):
        if letter in units:
            require(
                number.replace(".", "", 1).isdecimal(),
                lambda: f"{quoted(text)} is no duration: write 90, 45s, 9m, 2h or 1h30m",
            )
            seconds, number = seconds + float(number) * units[letter], ""
        else:
            number += letter
    require(seconds <= _LONGEST, lambda: f"{quoted(text)} is too long: at most {_LONGEST / 3600:.0f}h")
    require(not number and seconds > 0, lambda: f"{quoted(text)} is no duration: write 90, 45s, 9m, 2h or 1h30m")
    return seconds
