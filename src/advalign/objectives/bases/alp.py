"""Adversarial logit pairing."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F

from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Outputs, Term, Terms
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class ALP(Base):
    """(1 - mix) CE(f(x'), y) + mix CE(f(x), y) + beta MSE(f(x'), f(x)). Kannan et al. 2018.

    The default, without clean cross entropy, is the form that the LBGAT paper compares with, and by its numbers the
    VFD-Adv paper too; `alp(mix=0.5, beta=0.5)` is the mixed form of the original. MSE is the mean over N x K; both
    logits carry gradient.

    Raises:
        UserError: beta is negative, or mix is not in [0, 1].
    """

    name = "alp"
    supervises = ("adv",)

    def __init__(self, beta: float = 1.0, mix: float = 0.0) -> None:
        super().__init__()
        require(beta >= 0, lambda: f"alp: beta={beta:g} must be at least 0")
        require(0 <= mix <= 1, lambda: f"alp: mix={mix:g} must be in [0, 1]")
        self.beta, self.mix = beta, mix
        if mix:
            self.supervises = ("adv", "clean")

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy on the adversarial (and clean) images, and the logit pairing."""
        clean, adv = outs[CLEAN].logits, outs[ADV].logits
        terms = {
            "adv": Term(1 - self.mix, F.cross_entropy(adv, y), supervises="adv"),
            "pairing": Term(self.beta, F.mse_loss(adv, clean)),
        }
        if self.mix:
            terms["clean"] = Term(self.mix, F.cross_entropy(clean, y), supervises="clean")
        return terms
