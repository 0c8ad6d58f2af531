"""Robust perception: between an image and its adversarial example the logits go in a straight line."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor

from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Need, Outputs, Term, Terms
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class RPAT(PlugIn):
    """weight MSE(f(r x + (1 - r) x'), r f(x) + (1 - r) f(x')), on logits, joined to any base. Wang, Liu 2025.

    The mean is over N x K logits, and gradient flows through all three passes. Costs one forward of the student, and
    the clean one where the base has none.

    Args:
        weight: lambda.
        rate: r, the share of the clean image.

    Raises:
        UserError: weight is negative, or rate is not between 0 and 1.
    """

    name = "rpat"
    BETWEEN = Need("student", "between")
    needs = (CLEAN, ADV, BETWEEN)

    def __init__(self, weight: float = 1.0, rate: float = 0.5) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"rpat: weight={weight:g} must be at least 0")
        require(0 < rate < 1, lambda: f"rpat: rate={rate:g} must be between 0 and 1")
        self.weight, self.rate = weight, rate

    def views(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the images between the clean and the adversarial ones."""
        return views | {"between": self.rate * views["clean"] + (1 - self.rate) * views["adv"]}

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the squared distance of the logits between to what lies between the logits."""
        line = self.rate * outs[CLEAN].logits + (1 - self.rate) * outs[ADV].logits
        return {"rpat": Term(self.weight, F.mse_loss(outs[self.BETWEEN].logits, line))}
