"""Boundary guided adversarial training: a vanilla model's logits instead of hard labels."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F

from advalign.errors import require
from advalign.objectives.contract import ADV, Need, Outputs, Term, Terms, without_labels
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class BGAT(PlugIn):
    """weight MSE(f(x'), g(x)), replacing the terms on hard labels. Cui et al. 2021 (LBGAT), with a fixed guide.

    g is the frozen vanilla model on clean images; the mean is over N x K logits. The base's other terms stay: TRADES'
    KL is the paper's regulariser with alpha 6, `trades(beta=0)` its alpha 0.

    Args:
        additive: keep the base's label terms. Replacing them under-trains small students (the paper's is WRN-34-10).

    Raises:
        UserError: weight is negative.
    """

    name = "bgat"
    GUIDE = Need("vanilla", "clean")
    needs = (ADV, GUIDE)

    def __init__(self, weight: float = 1.0, additive: bool = False) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"bgat: weight={weight:g} must be at least 0")
        self.weight, self.additive = weight, additive
        self.replaces = frozenset() if additive else frozenset({"labels"})
        self.drops_labels = not additive

    def reweigh(self, base: Terms) -> Terms:
        """Drop the terms that supervise hard labels."""
        return base if self.additive else without_labels(base)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the squared distance of adversarial logits to the guide's clean ones."""
        return {"bgat": Term(self.weight, F.mse_loss(outs[ADV].logits, outs[self.GUIDE].logits))}
