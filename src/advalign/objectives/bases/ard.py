"""Adversarially robust distillation: the student answers perturbed images as a robust teacher answers clean ones."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F

from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Need, Outputs, Term, Terms, TrainingAttack
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class ARD(Base):
    """alpha T^2 KL(softmax(t(x) / T) || softmax(f(x') / T)) + (1 - alpha) CE(f(x), y). Goldblum et al. 2020.

    t is the frozen robust teacher. The KL is the batch mean of a sum over classes; the authors' code divides it by the
    number of classes too. Uniform start and eval-mode attack, as `at`; the authors attack in train mode
    (`--mode train`). With alpha 1, their default, the student has no clean pass.

    Raises:
        UserError: alpha is not in [0, 1], or the temperature is not above 0.
    """

    name = "ard"
    supervises = ()
    training_attack = TrainingAttack(start="uniform")
    TEACHER = Need("robust", "clean")
    needs = (ADV, TEACHER)

    def __init__(self, alpha: float = 1.0, temperature: float = 30.0) -> None:
        super().__init__()
        require(0 <= alpha <= 1, lambda: f"ard: alpha={alpha:g} must be in [0, 1]")
        require(temperature > 0, lambda: f"ard: temperature={temperature:g} must be above 0")
        self.alpha, self.temperature = alpha, temperature
        if alpha < 1:
            self.supervises, self.needs = ("clean",), (CLEAN, ADV, self.TEACHER)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the KL to the teacher, and with alpha below 1 cross entropy on the clean images."""
        t = self.temperature
        soft = t**2 * kl_divergence(outs[ADV].logits / t, outs[self.TEACHER].logits / t)
        terms = {"soft_adv": Term(self.alpha, soft.mean())}
        if self.supervises:
            terms["clean"] = Term(1 - self.alpha, F.cross_entropy(outs[CLEAN].logits, y), supervises="clean")
        return terms
