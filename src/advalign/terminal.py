"""What the commands show while they work: plain lines, and progress bars with the time that is left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def say(console: Console, line: str) -> None:
    """Print a line as it is: not wrapped, as paths are copied from it, and brackets are no markup."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


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
