"""Indirect gradient distillation: the student's logits change along the perturbation as the robust teacher's do."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.objectives.contract import ADV, Need, Outputs, Term, Terms
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class IGDM(PlugIn):
    """weight s KL(softmax(t(x') - t(x-)) || softmax(f(x') - f(x-))), x- = 2 x - x'. Lee et al. 2025; t is the teacher.

    The differences are twice the step times the gradient of each logit by the image. s is the share of the training
    that is done. x- is not clamped to [0, 1]. t is the frozen robust teacher; gradient flows through both of the
    student's passes. Meant for bases that learn from a teacher: `adaad+igdm` is the authors' script. Costs one forward
    of the student and one or two of the teacher.

    Args:
        weight: alpha; 1 for CIFAR-10 and 10 for CIFAR-100 by a comment in the authors' code.

    Raises:
        UserError: weight is negative.
    """

    name = "igdm"
    MINUS, TEACHER_ADV, TEACHER_MINUS = Need("student", "minus"), Need("robust", "adv"), Need("robust", "minus")
    needs = (ADV, MINUS, TEACHER_ADV, TEACHER_MINUS)
    progress: Tensor

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"igdm: weight={weight:g} must be at least 0")
        self.weight = weight
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def start_step(self, progress: float) -> None:
        """Note how far the training is."""
        self.progress.fill_(progress)

    def views(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the images on the other side of the clean ones."""
        return views | {"minus": 2 * views["clean"] - views["adv"]}

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the divergence of the two differences."""
        student = outs[ADV].logits - outs[self.MINUS].logits
        teacher = outs[self.TEACHER_ADV].logits - outs[self.TEACHER_MINUS].logits
        return {"igdm": Term(self.weight * self.progress, kl_divergence(student, teacher).mean())}
