"""Robust soft label adversarial distillation: a robust teacher's answers in place of every hard label."""

from __future__ import annotations

from typing import final

import torch

from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Need, Networks, Outputs, Term, Terms, Views
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class RSLAD(Base):
    """weight KL(t(x) || f(x')) + (1 - weight) KL(t(x) || f(x)). Zi et al. 2021; t is the frozen robust teacher.

    The attack maximises KL(t(x) || f(x')) in eval mode; t(x) is a constant of it. The KLs are batch means of sums over
    classes; the authors' code divides them by the number of classes too. It also runs x' before x, which only moves
    BatchNorm's running statistics.

    Raises:
        UserError: weight is not in [0, 1].
    """

    name = "rslad"
    supervises = ()
    TEACHER = Need("robust", "clean")
    needs = (CLEAN, ADV, TEACHER)

    def __init__(self, weight: float = 5 / 6) -> None:
        super().__init__()
        require(0 <= weight <= 1, lambda: f"rslad: weight={weight:g} must be in [0, 1]")
        self.weight = weight

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the KL divergence from the teacher's clean prediction."""
        with torch.no_grad():
            teacher = nets["robust"](views["clean"]).logits
        return AttackLoss(lambda x_adv: nets["student"](x_adv).logits, kl_divergence, teacher)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the KLs of the adversarial and of the clean images to the teacher on clean ones."""
        teacher = outs[self.TEACHER].logits
        return {
            "soft_adv": Term(self.weight, kl_divergence(outs[ADV].logits, teacher).mean()),
            "soft_clean": Term(1 - self.weight, kl_divergence(outs[CLEAN].logits, teacher).mean()),
        }
