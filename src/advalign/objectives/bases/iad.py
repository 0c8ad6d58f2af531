"""Introspective adversarial distillation (IAD-I): the student trusts the teacher where it is right, else itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.models.taps import Tapped
from advalign.objectives.contract import ADV, CLEAN, Need, Outputs, Term, Terms, TrainingAttack
from advalign.objectives.method import Base
from advalign.shapes import Labels, Logits, PerImage


@final
class IAD(Base):
    """KL(t(x) || f(x')) + (1 - A) KL(f(x) || f(x')), A = t(x')[y]^power. IAD-I of Zhu et al. 2022.

    t is the frozen robust teacher; the second term joins after the share `begin` of the epochs. A is a constant of each
    image. Gradient flows through both sides of the second KL, f(x) included, as in the authors' code. Uniform start and
    eval-mode attack, as `at`; the authors attack in train mode (`--mode train`).

    Raises:
        UserError: begin is not in [0, 1], or power is negative.
    """

    name = "iad"
    supervises = ()
    training_attack = TrainingAttack(start="uniform")
    TEACHER, GUIDE = Need("robust", "clean"), Need("robust", "adv")
    needs = (CLEAN, ADV, TEACHER, GUIDE)
    begun: Tensor

    def __init__(self, begin: float = 0.3, power: float = 0.1) -> None:
        super().__init__()
        require(0 <= begin <= 1, lambda: f"iad: begin={begin:g} must be in [0, 1], a share of the epochs")
        require(power >= 0, lambda: f"iad: power={power:g} must be at least 0")
        self.begin, self.power = begin, power
        self.register_buffer("begun", torch.zeros(()))

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Note whether introspection has begun."""
        self.begun.fill_(progress >= self.begin)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the KL to the teacher and, weighted by the doubt in it, to the student's own clean prediction."""
        adv = outs[ADV].logits
        doubt = self.begun * (1 - trust(outs[self.GUIDE].logits, y, self.power))
        return {
            "soft_adv": Term(1.0, kl_divergence(adv, outs[self.TEACHER].logits).mean()),
            "self": Term(1.0, (doubt * kl_divergence(adv, outs[CLEAN].logits)).mean()),
        }


def trust(teacher: Logits, y: Labels, power: float) -> PerImage:
    """Return the teacher's probability of each true class, raised to a power: (N,) from logits (N, K)."""
    return teacher.softmax(1).gather(1, y[:, None]).squeeze(1) ** power
