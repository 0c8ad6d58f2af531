"""What the commands show while they work: plain lines, and progress bars with the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def say(console: Console, line: str) -> None:
    """Print a line as it is: not wrapped, as paths are copied from it, and brackets are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


def format_duration(seconds: float) -> str:
    """Write a duration for readers: 40s, 12m, 3h 05m."""
    if seconds < 90:
        return f"{seconds:.0f}s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m"


def progress_bars(console: Console, unit: str) -> Progress:
    """Return bars that count in a unit and show elapsed and remaining time; none where the output is no terminal."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


LINE_SECONDS = 60.0


@contextmanager
def counting(console: Console, tasks: Sequence[str], images: int) -> Iterator[Callable[[str, int], None]]:
    """Show how far each task is; yields what is to be called with its name and the number of images just finished.

    Bars on a terminal; elsewhere, where a log is written, a line for each task that is done and now and then for one
    that is not.
    """
    done, last = dict.fromkeys(tasks, 0), time.monotonic()
    with progress_bars(console, "images") as bars:
        shown = {task: bars.add_task(task, total=images) for task in tasks}

        def advance(task: str, more: int) -> None:
            nonlocal last
            done[task] += more
            bars.advance(shown[task], more)
            if not console.is_terminal and (done[task] == images or time.monotonic() - last > LINE_SECONDS):
                say(console, f"{task}: {done[task]} of {images} images")
                last = time.monotonic()

        yield advance
