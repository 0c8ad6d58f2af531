"""SCORE: squared errors of probabilities in the place of cross entropy and KL."""

from __future__ import annotations

from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.attacks.ascent import AttackLoss
from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Networks, Outputs, Term, Terms, TrainingAttack, Views
from advalign.objectives.method import Base
from advalign.shapes import Labels, Logits, PerImage


@final
class SCORE(Base):
    """mean relu(D(p, 1_y) + beta D(p', p) - c0), D(a, b) = sum_k (a_k - b_k)^2. Pang et al. 2022 (LSE).

    TRADES with squared errors of probabilities. c0 = clip^2 (1 + 1 / (K - 1)) is the D of a prediction that gives
    1 - clip to the label and the rest equally to the other classes: images below it have no gradient. Gradient flows
    through both p and p'. The attack maximises D(p', p) in eval mode, with p a constant that is computed once.
    `form=at` is mean relu(D(p', 1_y) - c0), whose attack maximises D(p', 1_y), in train mode from a uniform start.

    Args:
        beta: weight of D(p', p); of no effect with form=at.
        form: `trades` or `at`.
        clip: 0.3, or 0.4 for form=at, if None, as the authors have without extra data; with generated data they clip
            nothing, clip=0.

    Raises:
        UserError: beta is negative, or clip is not in [0, 1).
    """

    name = "score"
    supervises = ("clean",)
    cross_entropy = False

    def __init__(self, beta: float = 6.0, form: Literal["trades", "at"] = "trades", clip: float | None = None) -> None:
        super().__init__()
        require(beta >= 0, lambda: f"score: beta={beta:g} must be at least 0")
        require(clip is None or 0 <= clip < 1, lambda: f"score: clip={clip} must be in [0, 1)")
        self.beta, self.form, self.clip = beta, form, clip
        self.clipped = {"trades": 0.3, "at": 0.4}[form] if clip is None else clip
        if form == "at":
            self.supervises, self.needs = ("adv",), (ADV,)
            self.training_attack = TrainingAttack(start="uniform", mode="train")

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the squared error from the clean prediction, or from the label."""
        student = nets["student"]
        if self.form == "at":
            return AttackLoss(lambda x_adv: student(x_adv).logits, squared_error, y)
        with torch.no_grad():
            clean = student(views["clean"]).logits
        return AttackLoss(lambda x_adv: student(x_adv).logits, squared_distance, clean, flat_at_clean=True)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the squared errors from the labels and, in the form of TRADES, from the clean prediction."""
        if self.form == "at":
            error = squared_error(outs[ADV].logits, y)
            kept, bound = self._kept(error, outs[ADV].logits)
            return {"adv": Term(1.0, (kept * (error - bound)).mean(), supervises="adv")}
        clean, adv = outs[CLEAN].logits, outs[ADV].logits
        error, tie = squared_error(clean, y), squared_distance(adv, clean)
        kept, bound = self._kept(error + self.beta * tie, clean)
        return {
            "clean": Term(1.0, (kept * (error - bound)).mean(), supervises="clean"),
            "tie": Term(self.beta, (kept * tie).mean()),
        }

    def _kept(self, loss: PerImage, logits: Logits) -> tuple[Tensor, float]:
        """Return 1 for the images whose loss exceeds c0 and 0 for the others, and c0."""
        bound = self.clipped**2 * (1 + 1 / (logits.shape[1] - 1))
        return (loss.detach() > bound).to(loss.dtype), bound


def squared_distance(logits: Logits, towards: Logits) -> PerImage:
    """Return sum_k (p_k - q_k)^2 of the two predictions."""
    return (logits.softmax(1) - towards.softmax(1)).square().sum(1)


def squared_error(logits: Logits, y: Labels) -> PerImage:
    """Return sum_k (p_k - 1[k = y])^2, the Brier score."""
    p = logits.softmax(1)
    return (p - F.one_hot(y, p.shape[1])).square().sum(1)
