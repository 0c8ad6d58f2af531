"""Introspective adversarial distillation with two teachers and labels (IAD-II)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.models.taps import Tapped
from advalign.objectives.bases.iad import trust
from advalign.objectives.contract import ADV, CLEAN, Need, Outputs, Term, Terms, TrainingAttack
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class IAD2(Base):
    """.25 CE(f', y) + .5 [A KL(t' || f') + (1 - A) KL(f || f')] + .25 KL(g' || f'). IAD-II of Zhu et al. 2022.

    f is f(x), and f' is f(x'), as for the frozen robust teacher t and the vanilla one, g. A = t(x')[y]^power once the
    share `begin` of the epochs is done, 1 before. A is a constant of each image; gradient flows through both sides of
    the KL to f(x), as in the authors' code. Uniform start and eval-mode attack, as `at`; the authors attack in train
    mode (`--mode train`).

    Raises:
        UserError: begin is not in [0, 1], or power is negative.
    """

    name = "iad2"
    supervises = ("adv",)
    training_attack = TrainingAttack(start="uniform")
    ROBUST, VANILLA = Need("robust", "adv"), Need("vanilla", "adv")
    needs = (CLEAN, ADV, ROBUST, VANILLA)
    begun: Tensor

    def __init__(self, begin: float = 0.2, power: float = 0.1) -> None:
        super().__init__()
        require(0 <= begin <= 1, lambda: f"iad2: begin={begin:g} must be in [0, 1], a share of the epochs")
        require(power >= 0, lambda: f"iad2: power={power:g} must be at least 0")
        self.begin, self.power = begin, power
        self.register_buffer("begun", torch.zeros(()))

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Note whether introspection has begun."""
        self.begun.fill_(progress >= self.begin)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy and the KLs to both teachers and to the student itself, all on adversarial images."""
        adv, robust = outs[ADV].logits, outs[self.ROBUST].logits
        doubt = self.begun * (1 - trust(robust, y, self.power))
        return {
            "adv": Term(0.25, F.cross_entropy(adv, y), supervises="adv"),
            "soft_robust": Term(0.5, ((1 - doubt) * kl_divergence(adv, robust)).mean()),
            "self": Term(0.5, (doubt * kl_divergence(adv, outs[CLEAN].logits)).mean()),
            "soft_vanilla": Term(0.25, kl_divergence(adv, outs[self.VANILLA].logits).mean()),
        }
