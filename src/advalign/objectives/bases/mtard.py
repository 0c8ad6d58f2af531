"""Multi-teacher adversarial robustness distillation: a robust teacher for perturbed images, a vanilla one for clean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.models.taps import Tapped
from advalign.objectives.contract import ADV, CLEAN, Need, Outputs, Term, Terms
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class MTARD(Base):
    """w KL(t(x') || f(x')) + (1 - w) KL(g(x) || f(x)). Zhao et al. 2022; t is the robust teacher, g the vanilla one.

    w begins at 1/2 and follows the losses at each training step, the present one included: with r = loss / first loss
    of each term, w <- (1 - rate) w + rate r_adv / (r_adv + r_clean), so the term that has come down less weighs more.
    As in the authors' code, rate is divided by 10 after 215, 260 and 285 of 300 epochs, here as shares of the training.
    w is a constant of the gradient. The attack maximises cross entropy.

    Raises:
        UserError: rate is not in [0, 1].
    """

    name = "mtard"
    supervises = ()
    ROBUST, VANILLA = Need("robust", "adv"), Need("vanilla", "clean")
    needs = (CLEAN, ADV, ROBUST, VANILLA)
    DROPS = (215 / 300, 260 / 300, 285 / 300)
    first: Tensor
    weights: Tensor
    decay: Tensor

    def __init__(self, rate: float = 0.025) -> None:
        super().__init__()
        require(0 <= rate <= 1, lambda: f"mtard: rate={rate:g} must be in [0, 1]")
        self.rate = rate
        self.register_buffer("first", torch.zeros(2))  # losses, adversarial and clean; 0: not seen yet
        self.register_buffer("weights", torch.full((2,), 0.5))
        self.register_buffer("decay", torch.ones(()))

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Lower the rate after the authors' drops of the learning rate."""
        self.decay.fill_(0.1 ** sum(progress >= drop for drop in self.DROPS))

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the KLs to the robust teacher on adversarial images and to the vanilla one on clean images."""
        adv = kl_divergence(outs[ADV].logits, outs[self.ROBUST].logits).mean()
        clean = kl_divergence(outs[CLEAN].logits, outs[self.VANILLA].logits).mean()
        weights = self._follow(torch.stack([adv, clean]).detach())
        return {"soft_adv": Term(weights[0], adv), "soft_clean": Term(weights[1], clean)}

    def _follow(self, losses: Tensor) -> Tensor:
        """Move the weights one step towards the relative losses, in training; return a copy, as buffers are written."""
        if not self.training:
            return self.weights.clone()
        losses = losses.clamp_min(1e-12)  # a student that equals its teacher must not make 0 / 0
        self.first.copy_(torch.where(self.first > 0, self.first, losses))
        relative = losses / self.first
        rate = self.rate * self.decay
        weights = (1 - rate) * self.weights + rate * relative / relative.sum()
        self.weights.copy_(weights)
        return weights
