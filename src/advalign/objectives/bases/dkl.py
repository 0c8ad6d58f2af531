"""Decoupled KL: TRADES' divergence as two terms, one for each side of it."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F

from advalign.attacks.ascent import AttackLoss
from advalign.errors import require
from advalign.objectives.bases.trades import from_clean
from advalign.objectives.contract import ADV, CLEAN, Networks, Outputs, Term, Terms, Views
from advalign.objectives.distances import pairwise_gap
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class DKL(Base):
    """CE(f(x), y) + alpha CE(p, p') + beta mean(1/4 sum_jk p_j p_k ((o_j - o_k) - (o'_j - o'_k))^2). Cui et al. 2024.

    o, o' are clean and adversarial logits, p, p' their predictions. p is a constant in both terms and o' in the last,
    so the first moves the adversarial side alone and the last the clean side alone. With alpha = beta the gradient is
    that of `trades(beta)`, exactly; the attack is TRADES' too.

    Raises:
        UserError: alpha or beta is negative.
    """

    name = "dkl"
    supervises = ("clean",)
    needs = (CLEAN, ADV)

    def __init__(self, alpha: float = 6.0, beta: float = 6.0) -> None:
        super().__init__()
        require(alpha >= 0, lambda: f"dkl: alpha={alpha:g} must be at least 0")
        require(beta >= 0, lambda: f"dkl: beta={beta:g} must be at least 0")
        self.alpha, self.beta = alpha, beta

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return TRADES' attack loss."""
        return from_clean(nets["student"], views["clean"])

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy on the clean images and the two sides of the KL."""
        clean, adv = outs[CLEAN].logits, outs[ADV].logits
        p = clean.detach().softmax(1)
        return {
            "clean": Term(1.0, F.cross_entropy(clean, y), supervises="clean"),
            "soft": Term(self.alpha, F.cross_entropy(adv, p)),
            "pairs": Term(self.beta, pairwise_gap(clean, adv.detach(), p).mean()),
        }
