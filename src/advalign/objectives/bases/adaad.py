"""Adaptive adversarial distillation: the attack looks for where student and teacher differ."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Need, Networks, Outputs, Term, Terms, Views
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class AdaAD(Base):
    """alpha KL(t(x') || f(x')) + (1 - alpha) KL(t(x) || f(x)). Huang et al. 2023; t is the frozen robust teacher.

    The attack maximises KL(t(x') || f(x')) in eval mode, with gradient through both networks: each of its steps runs
    the teacher too. The KLs are batch means of sums over classes, as in the authors' code for CIFAR-100; for CIFAR-10
    it divides by the number of classes too. With alpha 1, their default, neither network has a clean pass.

    Raises:
        UserError: alpha is not in [0, 1].
    """

    name = "adaad"
    supervises = ()
    TEACHER_ADV, TEACHER_CLEAN = Need("robust", "adv"), Need("robust", "clean")
    needs = (ADV, TEACHER_ADV)

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        require(0 <= alpha <= 1, lambda: f"adaad: alpha={alpha:g} must be in [0, 1]")
        self.alpha = alpha
        if alpha < 1:
            self.needs = (CLEAN, ADV, self.TEACHER_CLEAN, self.TEACHER_ADV)

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the KL divergence from the teacher's prediction of the same adversarial image."""
        return between_networks(nets, y)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the KLs to the teacher on the adversarial images and, with alpha below 1, on the clean ones."""
        terms = {"soft_adv": Term(self.alpha, kl_divergence(outs[ADV].logits, outs[self.TEACHER_ADV].logits).mean())}
        if self.alpha < 1:
            soft = kl_divergence(outs[CLEAN].logits, outs[self.TEACHER_CLEAN].logits).mean()
            terms["soft_clean"] = Term(1 - self.alpha, soft)
        return terms


def between_networks(nets: Networks, y: Labels) -> AttackLoss:
    """Return KL(t(x') || f(x')) of the robust teacher t and the student f, with gradient through both."""

    def both(x_adv: Tensor) -> Tensor:
        return torch.stack([nets["student"](x_adv).logits, nets["robust"](x_adv).logits], 1)

    return AttackLoss(both, lambda logits, _: kl_divergence(logits[:, 0], logits[:, 1]), y)
