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
from advalign.runtime import ranks
from advalign.shapes import Labels, Logits


@final
class MTARD(Base):
    """w KL(t(x') || f(x')) + (1 - w) KL(g(x) || f(x)). Zhao et al. 2022; t is the robust teacher, g the vanilla one.

    w begins at 1/2 and follows the losses at each training step, the present one included: with r = loss / first loss
    of each term, w <- (1 - rate) w + rate r_adv / (r_adv + r_clean), so the term that has come down less weighs more.
    As in the authors' code, rate is divided by 10 after 215, 260 and 285 of 300 epochs, here as shares of the training.
    w is a constant of the gradient. The attack maximises cross entropy.

    Args:
        rate: how far w goes to the relative losses in a step.
        balanced: B-MTARD, Zhao et al. 2024: the teachers' logits are divided by temperatures in [1, 10], which begin at
            1 and change by 0.001 a step so that the teachers' entropies become equal; the student's are not divided.

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
    HOTTEST, TEMPERATURE_RATE = 10.0, 0.001
    decay: Tensor
    temperatures: Tensor

    def __init__(self, rate: float = 0.025, balanced: bool = False) -> None:
        super().__init__()
        require(0 <= rate <= 1, lambda: f"mtard: rate={rate:g} must be in [0, 1]")
        self.rate, self.balanced = rate, balanced
        self.register_buffer("first", torch.zeros(2))  # losses, adversarial and clean; 0: not seen yet
        self.register_buffer("weights", torch.full((2,), 0.5))
        self.register_buffer("decay", torch.ones(()))
        if balanced:
            self.register_buffer("temperatures", torch.ones(2))  # of the robust and the vanilla teacher

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Lower the rates after the authors' drops of the learning rate."""
        self.decay.fill_(0.1 ** sum(progress >= drop for drop in self.DROPS))

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the KLs to the robust teacher on adversarial images and to the vanilla one on clean images."""
        adv, clean = self._balanced(outs) if self.balanced else self._plain(outs)
        weights = self._follow(ranks.batch_mean(torch.stack([adv, clean]).detach()))
        return {"soft_adv": Term(weights[0], adv), "soft_clean": Term(weights[1], clean)}

    def _plain(self, outs: Outputs) -> tuple[Tensor, Tensor]:
        adv = kl_divergence(outs[ADV].logits, outs[self.ROBUST].logits).mean()
        return adv, kl_divergence(outs[CLEAN].logits, outs[self.VANILLA].logits).mean()

    def _balanced(self, outs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the KLs to the teachers at their temperatures, and let these follow, in training."""
        robust = (outs[self.ROBUST].logits / self.temperatures[0]).softmax(1)
        vanilla = (outs[self.VANILLA].logits / self.temperatures[1]).softmax(1)
        if self.training:
            ahead = torch.sign(_entropy(robust) - _entropy(vanilla))  # the teacher that is less sure is cooled
            moved = self.TEMPERATURE_RATE * self.decay * torch.stack([ahead, -ahead])
            self.temperatures.copy_((self.temperatures - moved).clamp(1, self.HOTTEST))
        adv = (robust * ((robust + 1e-5).log() - outs[ADV].logits.log_softmax(1))).sum(1).mean()
        return adv, (vanilla * ((vanilla + 1e-5).log() - outs[CLEAN].logits.log_softmax(1))).sum(1).mean()

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


def _entropy(p: Logits) -> Tensor:
    """Return the mean entropy of the whole batch's predictions (N, K), with the constant of the authors' code."""
    return ranks.batch_mean(-(p * (p + 1e-5).log()).sum(1).mean())
