"""ReBAT: the student stays near an average of itself on adversarial images, once the learning rate has dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.models.taps import Tapped
from advalign.objectives.contract import ADV, Need, Outputs, Term, Terms
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class ReBAT(PlugIn):
    """weight KL(w(x') || f(x')) from the share `begin` of the epochs on, joined to any base. Wang et al. 2023 (ReBAT).

    w is an average of the student's weights and BatchNorm statistics over the steps from `begin` on, the network `ema`,
    in eval mode and without gradient; before, it is a copy of the student, and the term has weight 0. x' is made
    against the student. The other half of the method is a learning rate that hardly drops, and w is what it evaluates:
    the preset `rebat`. Costs one forward of w.

    Args:
        weight: beta.
        begin: share of the epochs; the authors' epoch 105 of 200, five after the first drop of the learning rate.
        decay: what a step leaves of the average.

    Raises:
        UserError: weight is negative, begin is not in [0, 1], or decay is not in [0, 1).
    """

    name = "rebat"
    replaces = frozenset({"average"})
    EMA = Need("ema", "adv")
    needs = (ADV, EMA)
    begun = False

    def __init__(self, weight: float = 1.0, begin: float = 0.525, decay: float = 0.999) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"rebat: weight={weight:g} must be at least 0")
        require(0 <= begin <= 1, lambda: f"rebat: begin={begin:g} must be in [0, 1], a share of the epochs")
        require(0 <= decay < 1, lambda: f"rebat: decay={decay:g} must be in [0, 1)")
        self.weight, self.begin, self.decay = weight, begin, decay

    def get_extra_state(self) -> Tensor:
        """Return whether the average has begun, for a resumed run."""
        return torch.tensor(self.begun)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore it."""
        self.begun = bool(state)

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Note whether the average has begun."""
        self.begun = progress >= self.begin

    def average_decay(self) -> float:
        """Return the decay once it has begun; before, the average is the student."""
        return self.decay if self.begun else 0.0

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the divergence from the average's prediction of the adversarial images."""
        gap = kl_divergence(outs[ADV].logits, outs[self.EMA].logits).mean()
        return {"rebat": Term(self.weight * self.begun, gap)}
