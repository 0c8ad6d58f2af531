"""Generalist: a robust and a natural learner, averaged into one network, which is handed back to both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.errors import UserError, require
from advalign.models.taps import Tapped
from advalign.objectives.contract import Need, Outputs, Term, Terms
from advalign.objectives.method import Base, PlugIn
from advalign.shapes import Labels


@final
class Generalist(PlugIn):
    """CE(g(x), y) joins the base's loss; the model is w <- d w + (1 - d) (b f + (1 - b) g). Wang and Wang 2023.

    f, the student, learns by the base, and g, the network `natural` of the same architecture, on clean images; no term
    ties them. w is an average of their weights and BatchNorm statistics over the steps, with d = min(decay, (1 + t) /
    (10 + t)): it is what is exported. From the share `begin` of the epochs on, f and g take over w after every `every`
    epochs, and the optimiser keeps its momentum. b is 1 until 2/3 of the epochs, and falls linearly from there. Both
    learners have one optimiser and one schedule. Costs one forward and backward of g.

    Args:
        share_end: b at the end of the training, gamma in the paper.
        begin: share of the epochs before f and g first become w; the authors' epoch 75 of 120.
        every: epochs from one such time to the next, c in the paper.
        decay: what a step leaves of the average.

    Raises:
        UserError: a share is out of range, every is below 1, or decay is not in [0, 1); when bound, f and g differ in
            shape; the base makes no adversarial examples.
    """

    name = "generalist"
    replaces = frozenset({"average"})
    NATURAL = Need("natural", "clean")
    needs = (NATURAL,)
    learns = ("natural",)
    partner = "natural"
    MIXED_FROM = 2 / 3
    updates: Tensor

    def __init__(self, share_end: float = 0.4, begin: float = 0.625, every: int = 5, decay: float = 0.999) -> None:
        super().__init__()
        require(0 <= share_end <= 1, lambda: f"generalist: share_end={share_end:g} must be in [0, 1]")
        require(
            0 <= begin <= self.MIXED_FROM,
            lambda: f"generalist: begin={begin:g} must be in [0, 2/3]: learners that have parted cannot be averaged",
        )
        require(every >= 1, lambda: f"generalist: every={every} must be at least 1")
        require(0 <= decay < 1, lambda: f"generalist: decay={decay:g} must be in [0, 1)")
        self.share_end, self.begin, self.every, self.decay = share_end, begin, every, decay
        self.share, self.since = 1.0, -1  # b, and the epochs since the learners first met
        self.register_buffer("updates", torch.zeros(()))

    def get_extra_state(self) -> Tensor:
        """Return b and the count of epochs, for a resumed run."""
        return torch.tensor([self.share, self.since], dtype=torch.double)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore them."""
        share, since = state.tolist()
        self.share, self.since = share, int(since)

    def joins(self, base: Base) -> None:
        """Refuse a base whose student is no robust learner."""
        if base.training_attack is None:
            raise UserError(
                f"generalist: its robust learner is the base's, and {base.name} makes no adversarial examples"
            )

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Note b, and whether the learners take over the average."""
        mixed = max(0.0, progress - self.MIXED_FROM) / (1 - self.MIXED_FROM)
        self.share = 1 - (1 - self.share_end) * mixed
        self.since += self.since >= 0 or progress >= self.begin
        self.hands_back = self.since >= 0 and self.since % self.every == 0

    def average_decay(self) -> Tensor:
        """Return the decay of this step, and count it."""
        decay = ((1 + self.updates) / (10 + self.updates)).clamp(max=self.decay)
        self.updates += 1
        return decay

    def student_share(self) -> float:
        """Return b."""
        return self.share

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the loss of the natural learner."""
        return {"natural": Term(1.0, F.cross_entropy(outs[self.NATURAL].logits, y))}
