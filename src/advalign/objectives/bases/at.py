"""PGD adversarial training."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F

from advalign.objectives.contract import ADV, Outputs, Term, Terms, TrainingAttack
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class AT(Base):
    """CE(f(x'), y). Madry et al. 2018.

    Uniform start and eval-mode attack (Pang et al. 2021); Rice et al. 2020 attack in train mode, which the recipe
    `rice` does.
    """

    name = "at"
    supervises = ("adv",)
    training_attack = TrainingAttack(start="uniform")
    needs = (ADV,)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy on the adversarial images."""
        return {"adv": Term(1.0, F.cross_entropy(outs[ADV].logits, y), supervises="adv")}
