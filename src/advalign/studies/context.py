"""How a study's jobs are run, and how one ends."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ExecutionContext:
    """Device, data folder, deadline and plug-ins with which jobs are run."""

    device: str = "auto"
    data_dir: Path | None = None
    deadline: float | None = None
    """as `time.time` counts seconds, the same on all machines"""
    plugins: tuple[str, ...] = ()
    """the user's own plug-ins as `package.module:Class`, which every process registers"""

    @property
    def left(self) -> float | None:
        """The seconds that are left, or None without a deadline."""
        return None if self.deadline is None else max(0.0, self.deadline - time.time())


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: Literal["finished", "stopped", "failed", "busy"]
    """busy: another process trains or measures one of its runs"""
    reason: str = ""
