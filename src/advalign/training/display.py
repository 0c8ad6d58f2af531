"""What a training shows while it works: a bar, a line for each epoch, and how long it will take."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import final

from rich.progress import Progress

from advalign.runtime.progress import say
from advalign.training.announcement import time_line
from advalign.training.guard import Collapse
from advalign.training.loop import LogEntry, TrainState
from advalign.training.plan import Plan

_SHOWN = {"clean": "validation: clean", "robust": "PGD-10"}
SHORT = 30.0
"""Seconds below which nobody needs to know."""
_WARM_UP, _TIMED = 2, 6
"""Steps before the time is taken, and steps over which it is."""


@final
class Display:
    """A run's bar and lines, and the other listeners to its log."""

    def __init__(self, bars: Progress, planned: Plan, listeners: list[Callable[[LogEntry], None]]) -> None:
        self.bars, self.epochs, self.listeners = bars, planned.recipe.epochs, listeners
        self.planned, self.task = planned, bars.add_task(str(planned.method), total=None)
        self.steps, self.began = 0, 0.0

    def step(self, train_state: TrainState, steps: int) -> None:
        """Move the bar; after a few steps, say how long all will take."""
        done = train_state.epoch * steps + train_state.step
        self.bars.update(self.task, total=self.epochs * steps, completed=done)
        self.steps += 1
        if self.steps == _WARM_UP:
            self.began = time.monotonic()
        elif self.steps == _WARM_UP + _TIMED:
            seconds, left = (time.monotonic() - self.began) / _TIMED, self.epochs * steps - done
            if seconds * left > SHORT:
                say(self.bars.console, time_line(self.planned, seconds, left, steps))

    def collapse(self, collapse: Collapse) -> None:
        """Say that the guard has gone back."""
        back = f"Back to epoch {collapse.back_to:.2f}" if collapse.back_to < collapse.epoch else "No state was good"
        say(
            self.bars.console,
            f"catastrophic overfitting in epoch {math.ceil(collapse.epoch)}: the accuracy under PGD-10 on validation "
            f"images is {collapse.after:.0%}, and {collapse.before:.0%} was the highest. {back}; PGD with at least "
            f"{collapse.steps} steps from there",
        )

    def epoch(self, row: LogEntry) -> None:
        """Say what an epoch has come to."""
        validation = row.get("validation", {})
        accuracies = [f"{label} {validation[key]:.2%}" for key, label in _SHOWN.items() if key in validation]
        shown = [f"epoch {row['epoch']:>3}/{self.epochs}", f"loss {row['loss']:.4f}", *accuracies]
        if row.get("skipped_steps"):
            shown.append(f"{row['skipped_steps']} steps left out")
        say(self.bars.console, "  ".join([*shown, f"lr {row['lr']:.4f}", f"{row['seconds']:.0f} s"]))
        for listen in self.listeners:
            listen(row)
