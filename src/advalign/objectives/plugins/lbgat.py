"""Learnable boundary guided adversarial training: BGAT whose guide learns at the same time."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F

from advalign.errors import require
from advalign.objectives.contract import ADV, Need, Outputs, Term, Terms, without_labels
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class LBGAT(PlugIn):
    """weight MSE(f(x'), g(x)) + CE(g(x), y), replacing the terms on hard labels. Cui et al. 2021, eq. 6.

    g is trained jointly from scratch, in train mode, on clean images. Its logits are not detached: the MSE also moves
    the guide towards what the robust student can imitate. The student never sees y. The authors train epoch 1 at a
    fifth of the learning rate; unstable without it (`--warmup 1`).

    Args:
        additive: keep the base's label terms. Replacing them under-trains small students (the paper's is WRN-34-10).

    Raises:
        UserError: weight is negative.
    """

    name = "lbgat"
    GUIDE = Need("guide", "clean")
    needs = (ADV, GUIDE)
    learns = ("guide",)

    def __init__(self, weight: float = 1.0, additive: bool = False) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"lbgat: weight={weight:g} must be at least 0")
        self.weight, self.additive = weight, additive
        self.replaces = frozenset() if additive else frozenset({"labels"})
        self.drops_labels = not additive

    def reweigh(self, base: Terms) -> Terms:
        """Drop the terms that supervise hard labels."""
        return base if self.additive else without_labels(base)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the squared distance of adversarial logits to the guide's clean ones, and the guide's own loss."""
        guide = outs[self.GUIDE].logits
        return {
            "lbgat": Term(self.weight, F.mse_loss(outs[ADV].logits, guide)),
            "guide": Term(1.0, F.cross_entropy(guide, y)),
        }
