"""Standard training on clean images: the vanilla model."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F

from advalign.objectives.contract import CLEAN, Outputs, Term, Terms
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class Natural(Base):
    """CE(f(x), y), no adversarial examples: empirical risk minimisation, Vapnik 1991.

    What VFD and HAT call the vanilla or standard model.
    """

    name = "natural"
    supervises = ("clean",)
    training_attack = None
    needs = (CLEAN,)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy on the clean images."""
        return {"clean": Term(1.0, F.cross_entropy(outs[CLEAN].logits, y), supervises="clean")}
