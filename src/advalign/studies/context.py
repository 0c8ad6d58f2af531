"""Where a study's jobs are carried out, and how one ends."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExecutionContext:
    """Where jobs are carried out, and until when."""

    device: str = "auto"
    data_dir: Path | None = None
    deadline: float | None = None
    """In the seconds of `time.time`, which machines share."""
    plugins: tuple[str, ...] = ()
    """`package.module:Class` of those of one's own, which every process has to know."""

    @property
    def left(self) -> float | None:
        """The seconds that are left, or None if there is no end."""
        return None if self.deadline is None else max(0.0, self.deadline - time.time())


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: Literal["finished", "stopped", "failed", "busy"]
    """busy: another process trains or measures one of its runs"""
    reason: str = ""
