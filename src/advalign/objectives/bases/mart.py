"""MART: misclassified examples weigh more."""

from __future__ import annotations

from typing import final

import torch

from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Outputs, Term, Terms
from advalign.objectives.distances import boosted_cross_entropy
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class MART(Base):
    """BCE(p', y) + beta mean(KL(p || p') (1 - p[y])). Wang et al. 2020, eq. 11; no clean cross entropy.

    p, p' and the weight 1 - p[y] all carry gradient, and the constants inside the logarithms are those of the
    authors' code. The attack maximises cross entropy.

    Raises:
        UserError: beta is negative.
    """

    name = "mart"
    supervises = ("adv",)

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        require(beta >= 0, lambda: f"mart: beta={beta:g} must be at least 0")
        self.beta = beta

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the boosted cross entropy on the adversarial images and the weighted KL."""
        p, p_adv = outs[CLEAN].logits.softmax(1), outs[ADV].logits.softmax(1)
        kl = (p * (p.clamp_min(torch.finfo(p.dtype).tiny).log() - torch.log(p_adv + 1e-12))).sum(1)
        unsure = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
        return {
            "adv": Term(1.0, boosted_cross_entropy(outs[ADV].logits, y).mean(), supervises="adv"),
            "kl": Term(self.beta, (kl * unsure).mean()),
        }
