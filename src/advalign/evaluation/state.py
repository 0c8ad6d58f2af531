"""Unfinished evaluations on disk, from which a second call resumes to the same bits."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from advalign.errors import require
from advalign.runs.checkpoint import convert_state, load_state, save_state
from advalign.runtime.sealed import Owner

SAVE_SECONDS = 10.0


def state_owner(path: Path) -> Owner:
    """Return what a state file belongs to: its name, which says what is being measured, and by which version."""
    return Owner(path.name, "remove it, and the work starts again")


class StateFile:
    """A file in which unfinished work is kept, written at most every ten seconds; without a path, nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.saved = path, time.monotonic()

    def save(self, content: Mapping[str, Any]) -> None:
        """Write the content, unless the last time was a moment ago."""
        if self.path is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            save_state(self.path, content, state_owner(self.path))
            self.saved = time.monotonic()


@dataclass
class CurrentAttack:
    """The attack under way."""

    attack: str
    """Its spelling."""
    rows: Tensor
    """Indices of the images that its present member attacks: those that withstand the members before."""
    member: int = 0
    """The number of members that are done."""
    batch: int = 0
    """The number of batches that the present member has done."""


@dataclass
class EvaluationState:
    """What an evaluation has measured so far; the names of the fields are the keys of the state file."""

    correct: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, list[int]] = field(default_factory=dict)
    trails: dict[str, dict[str, float]] = field(default_factory=dict)
    members: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    examples: dict[str, Tensor] = field(default_factory=dict)
    """Adversarial images by attack, on the CPU."""
    doubts: list[str] = field(default_factory=list)
    """Warnings of the clean pass."""
    lost: dict[str, int] = field(default_factory=dict)
    """By attack, the number of images with outputs that are not finite."""
    targeted: dict[str, list[int]] = field(default_factory=dict)
    """By targeted attack, how many images are classified as their target, and how many were driven to one."""
    under_way: CurrentAttack | None = None

    @classmethod
    def read(cls, path: Path, n: int) -> EvaluationState:
        """Read the state file of an evaluation on n images.

        Raises:
            UserError: it is damaged or something else.
        """
        content = load_state(path, ("correct", "under_way"), state_owner(path))
        state = convert_state({**content, "under_way": content["under_way"] or None}, cls, path)
        require(state._is_of(n), lambda: f"{path} is damaged or of other images: {state_owner(path).remedy}")
        return state

    def _is_of(self, n: int) -> bool:
        """Tell whether what is there belongs together, and to n images."""
        flags = all(each.dtype == torch.bool and each.shape == (n,) for each in self.correct.values())
        counts = [*self.passes.values(), *(each for member in self.members.values() for each in member.values())]
        known = self.correct.keys() == self.seconds.keys() == self.passes.keys()
        if not (flags and known and all(len(each) == 2 for each in counts)):
            return False
        if any(len(each) != n for each in self.examples.values()):
            return False
        current = self.under_way
        if current is None:
            return True
        rows = current.rows
        whole = rows.dtype == torch.int64 and rows.ndim == 1 and bool(((rows >= 0) & (rows < n)).all())
        return whole and current.attack in self.correct and current.member >= 0 and current.batch >= 0

    def content(self) -> dict[str, Any]:
        """Return what the state file holds."""
        return {**vars(self), "under_way": vars(self.under_way) if self.under_way else {}}
