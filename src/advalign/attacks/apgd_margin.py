"""Auto-PGD towards one wrong class after another on the plain difference of two logits, from two kinds of start."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from advalign.attacks.apgd import auto_pgd
from advalign.attacks.ascent import AttackLoss, value_and_grad
from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.goal import Goal
from advalign.attacks.losses import targeted_margin
from advalign.attacks.targets import pairs_with_wrong_classes
from advalign.shapes import ImageBatch, Labels
from advalign.threats import Threat, ascent_step

_ODI_STEPS = 2


@dataclass(frozen=True)
class APGDMargin(Attack):
    """Auto-PGD on z_t - z_y towards one wrong class t after another, the likeliest first. After Gao et al. 2022 (MM).

    `apgd-t` without the denominator of its loss, and with fewer steps.

    Args:
        targets: how many classes to try; at most all that are wrong.
        start: `uniform`, the random start of Auto-PGD; or `odi`, two steps of the whole radius along a random direction
            of the logits (output diversified initialisation, Tashiro et al. 2020), drawn anew for each target.

    Raises:
        UserError: steps or targets out of range, or another start.
    """

    name: ClassVar[str] = "apgd-margin"
    steps: int = 40
    targets: int = 9
    start: Literal["uniform", "odi"] = "uniform"

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""

        def attempt(pair: Tensor, rows: Tensor) -> Tensor:
            attack_loss = AttackLoss(model, targeted_margin, pair[rows])
            start = odi_start(model, x[rows], self.threat) if self.start == "odi" else None
            return auto_pgd(attack_loss, x[rows], y[rows], self.threat, steps=self.steps, start=start)

        pairs = pairs_with_wrong_classes(model, x, y, self.targets)
        return attack_survivors(model, x, Goal(y), (partial(attempt, pair) for pair in pairs))


def odi_start(model: nn.Module, x: ImageBatch, threat: Threat) -> ImageBatch:
    """Return images of diverse outputs in the ball: from a uniform draw, two steps along random weights of the logits.

    Tashiro et al. 2020 (NeurIPS), eq. 3, with weights uniform in [-1, 1] and steps of the whole radius.
    """
    with torch.no_grad():
        weights = torch.empty_like(model(x[:1])).expand(len(x), -1).contiguous().uniform_(-1, 1)
    attack_loss = AttackLoss(model, lambda logits, weights: (logits * weights).sum(1), weights)
    project, x_adv = threat.ball(x), threat.sample(x)
    for _ in range(_ODI_STEPS):
        grad = value_and_grad(attack_loss, x_adv).grad
        x_adv = project(x_adv + threat.eps * ascent_step(threat, grad))
    return x_adv
