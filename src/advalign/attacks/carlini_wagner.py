"""The L2 attack of Carlini and Wagner 2017: the nearest adversary, not the worst one within a radius."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks.ascent import AttackLoss, value_and_grad
from advalign.attacks.contract import Attack
from advalign.attacks.goal import Goal
from advalign.attacks.losses import margin
from advalign.attacks.targets import Target, check_target, choose_targets, pursue
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels

CHECKS = 10
"""How often in a run `abort` looks for progress, as in the authors' code."""


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Minimise ||x' - x||^2 + c max(z_y - max_k z_k, -kappa) by Adam in tanh space. Carlini and Wagner 2017.

    Gives the nearest iterate that is misclassified, with a margin of kappa or more, and the clean image where there
    is none. Nothing holds it inside the threat model; PGD with `loss="margin"` is its sibling that stays there. At a
    fixed c an image with margin m at a distance d from the boundary is crossed only where c >= 2 d^2 / m, so accuracy
    under it measures the scale of the logits as much as robustness.

    Args:
        c: weight of the margin; the first one of a search.
        steps: forward and backward passes, each round of the search.
        search: rounds of the authors' binary search for the smallest c of each image that succeeds: times 10 until one
            does. The authors take 9, and c=0.001. 0 and 1 keep c as it is, as torchattacks does.
        abort: an image whose objective has not fallen by 0.01 % in a tenth of the steps is left alone. The authors
            decide for the whole batch; by image, an image's fate does not depend on its neighbours.
        target: the class to be entered, instead of any wrong one; as for PGD.

    Raises:
        UserError: c, kappa, steps, lr or search out of range, or a target that is no class.
    """

    name: ClassVar[str] = "cw"
    bounded: ClassVar[bool] = False
    transfers: ClassVar[bool] = True
    c: float = 1.0
    kappa: float = 0.0
    steps: int = 1000
    lr: float = 0.01
    search: int = 0
    abort: bool = False
    target: Target = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.name, self.target)
        require(self.c > 0, lambda: f"cw: c={self.c} must be above 0")
        require(self.kappa >= 0, lambda: f"cw: kappa={self.kappa} must be at least 0")
        require(self.lr > 0, lambda: f"cw: lr={self.lr} must be above 0")
        require(self.search >= 0, lambda: f"cw: search={self.search} must be at least 0")

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return pursue(self, model, x, y, partial(self._search, model))

    def target_classes(self, model: nn.Module, x: ImageBatch, y: Labels) -> Labels | None:
        """Return the class (N,) to which each image is driven; None without target."""
        return choose_targets(self.target, self, model, x, y)

    def _search(self, model: nn.Module, x: Tensor, goal: Goal) -> Tensor:
        x_adv, nearest = x.clone(), x.new_full((len(x),), torch.inf)
        c, low, high = x.new_full((len(x),), self.c), x.new_zeros(len(x)), x.new_full((len(x),), torch.inf)
        for _ in range(max(self.search, 1)):
            nearby, length = self._descend(model, x, goal, c)
            nearer = length < nearest
            x_adv[nearer], nearest[nearer] = nearby[nearer], length[nearer]
            crossed = length.isfinite()
            low, high = torch.where(crossed, low, c), torch.where(crossed, c, high)
            c = torch.where(high.isinf(), 10 * c, (low + high) / 2)
        return x_adv

    def _descend(self, model: nn.Module, x: Tensor, goal: Goal, c: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest adversaries of one run with weights c (N,), and their squared L2 norms, inf for none."""
        result, lengths = x.clone(), x.new_full((len(x),), torch.inf)
        rows, before = torch.arange(len(x), device=x.device), lengths.clone()
        w = ((2 * x - 1) * 0.999999).atanh()  # a pixel at the wall would be at infinity
        mean, square = torch.zeros_like(w), torch.zeros_like(w)
        for step in range(self.steps if len(x) else 0):
            tanh = w.tanh()
            x_adv = (tanh + 1) / 2
            # The gradient of the margin by the logits is +-1, so fp16 scales nothing.
            logits, gap, rise = value_and_grad(AttackLoss(model, goal.loss(margin), goal.classes), x_adv)
            length = (x_adv - x).flatten(1).square().sum(1)
            cost = length + c * (-gap).clamp_min(-self.kappa)
            pull = torch.where(gap <= self.kappa, c, 0).view(-1, *[1] * (x.ndim - 1))
            grad = (2 * (x_adv - x) - pull * rise) * (1 - tanh.square()) / 2

            kept = (length < lengths[rows]) & (gap >= self.kappa) & goal.reached(model, logits, x_adv)
            result[rows[kept]], lengths[rows[kept]] = x_adv[kept], length[kept]

            mean = mean.lerp(grad, 0.1)
            square = square.lerp(grad.square(), 0.001)
            move = (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            w = w - self.lr * move
            if self.abort and step % -(-self.steps // CHECKS) == 0:
                going = cost <= 0.9999 * before
                if not going.any():
                    break
                x, c, rows, w, mean, square, before = (each[going] for each in (x, c, rows, w, mean, square, cost))
                goal = goal.take(going)
        return result, lengths
