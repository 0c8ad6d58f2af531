"""TRADES: clean accuracy and a smooth neighbourhood."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F

from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Network, Networks, Outputs, Term, Terms, Views
from advalign.objectives.method import Base
from advalign.shapes import ImageBatch, Labels


@final
class TRADES(Base):
    """CE(f(x), y) + beta KL(p || p'), the batch mean of a sum over classes. Zhang et al. 2019, eq. 5; beta = 1/lambda.

    Gradient flows through both p and p'. The attack maximises the KL to the clean prediction in eval mode, which is
    computed once: the authors' code recomputes it at each step (23 student forwards for 10 steps, here 13) and runs
    the clean images once more in train mode, which only moves BatchNorm's running statistics.

    Example:
        >>> import advalign as aa
        >>> aa.TRADES(beta=3) + aa.VFD()
        Method(trades(beta=3)+vfd)

    Raises:
        UserError: beta is negative.
    """

    name = "trades"
    supervises = ("clean",)

    def __init__(self, beta: float = 6.0) -> None:
        super().__init__()
        require(beta >= 0, lambda: f"trades: beta={beta:g} must be at least 0")
        self.beta = beta

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the KL divergence from the clean prediction."""
        return from_clean(nets["student"], views["clean"])

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy on the clean images and the KL that ties the adversarial ones to them."""
        clean, adv = outs[CLEAN].logits, outs[ADV].logits
        return {
            "clean": Term(1.0, F.cross_entropy(clean, y), supervises="clean"),
            "kl": Term(self.beta, kl_divergence(adv, clean).mean()),
        }


def from_clean(student: Network, x: ImageBatch) -> AttackLoss:
    """Return the KL divergence from the student's prediction of the clean images x, a constant of the attack."""
    with torch.no_grad():
        clean = student(x).logits
    return AttackLoss(lambda x_adv: student(x_adv).logits, kl_divergence, clean, flat_at_clean=True)
