"""HAT: TRADES and helper examples that keep the margin from growing where it need not."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor

from advalign.attacks.ascent import AttackLoss
from advalign.errors import require
from advalign.objectives.bases.trades import TRADES
from advalign.objectives.contract import ADV, CLEAN, Need, Networks, Outputs, Term, Terms, Views
from advalign.objectives.method import Base
from advalign.shapes import ImageBatch, Labels


@final
class HAT(Base):
    """CE(f(x), y) + beta KL(p || p') + gamma CE(f(x + reach (x' - x)), y~). Rade and Moosavi-Dezfooli 2022.

    y~ is the class that the vanilla model gives to x' (as in the authors' code, not to the helper example), and the
    helper example is not clamped to [0, 1].

    Raises:
        UserError: beta or gamma is negative, or reach is not above 1.
    """

    name = "hat"
    supervises = ("clean",)
    HELPER, LABELS = Need("student", "helper"), Need("vanilla", "adv")
    needs = (CLEAN, ADV, HELPER, LABELS)

    def __init__(self, beta: float = 2.5, gamma: float = 0.5, reach: float = 2.0) -> None:
        super().__init__()
        require(beta >= 0, lambda: f"hat: beta={beta:g} must be at least 0")
        require(gamma >= 0, lambda: f"hat: gamma={gamma:g} must be at least 0")
        require(reach > 1, lambda: f"hat: reach={reach:g} must be above 1, beyond the adversarial example")
        self.beta, self.gamma, self.reach = beta, gamma, reach
        self.trades = TRADES(beta)

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return TRADES' attack loss."""
        return self.trades.attack_loss(nets, views, y)

    def views(self, x: ImageBatch, x_adv: ImageBatch) -> dict[str, Tensor]:
        """Return the clean, adversarial and helper views."""
        return {"clean": x, "adv": x_adv, "helper": x + self.reach * (x_adv - x)}

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return TRADES' terms and the helper's cross entropy."""
        labels = outs[self.LABELS].logits.argmax(1)
        helper = Term(self.gamma, F.cross_entropy(outs[self.HELPER].logits, labels))
        return self.trades.terms(outs, y) | {"helper": helper}
