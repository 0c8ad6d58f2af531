"""DDN and FMN: the nearest adversary instead of the worst one within a radius, for accuracy at every radius at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks.ascent import AttackLoss, value_and_grad
from advalign.attacks.classification import fooled_in, misclassified_by_original
from advalign.attacks.contract import Attack
from advalign.attacks.losses import cross_entropy, margin
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels, PerImage
from advalign.threats import L1, L2, Linf, Norm, PixelLinf, Pixels, Threat, shortened

BISECTIONS = 10
"""Forward passes at the end, which halve the way between the nearest adversary and the images before it."""
STRETCHES = (1.0, 1.001, 1.01, 1.1, 2.0, 10.0, 100.0)
"""Multiples of the way to the adversary that the search has found, tried in turn until the network itself is fooled."""


@dataclass(frozen=True)
class DDN(Attack):
    """Steps of decreasing length, projected to a sphere that shrinks where an image fools and grows where it does not.

    Decoupled direction and norm, Rony et al. 2019 (CVPR), algorithm 1, in L2 whatever the threat model. Gives the
    nearest iterate that is misclassified, and the clean image where there is none. Where the cross entropy has no
    gradient, as with a network that is very sure, the step has a normally distributed direction, as in the authors'
    code. Unlike there images are not rounded to 256 levels, and at the end the way to the nearest adversary is halved
    ten times.

    Args:
        gamma: share by which the sphere shrinks or grows in a step.

    Raises:
        UserError: steps or gamma out of range.
    """

    name: ClassVar[str] = "ddn"
    bounded: ClassVar[bool] = False
    nearest: ClassVar[tuple[Norm, ...]] = ("l2",)
    steps: int = 100
    gamma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.gamma < 1, lambda: f"ddn: gamma={self.gamma:g} must be between 0 and 1")

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        l2 = L2()
        delta, found = torch.zeros_like(x), _Nearest(x)
        radius, farthest = torch.ones_like(found.length), l2.distance(torch.maximum(x, 1 - x), 0 * x)
        for step in range(self.steps):
            x_adv = (x + delta).clamp_(0, 1)
            logits, _, grad = value_and_grad(AttackLoss(model, cross_entropy, y), x_adv)
            fools = fooled_in(model, logits, x_adv, y)
            found.keep(x_adv, l2.distance(x_adv, x), fools)
            radius = (radius * torch.where(fools, 1 - self.gamma, 1 + self.gamma)).minimum(farthest)
            drawn = torch.randn_like(x)  # for all images in every step, so that none depends on its neighbours
            rise = torch.where(_per_image((grad != 0).flatten(1).any(1), x), grad, drawn)
            moved = x_adv - x + _falling(step, self.steps, 1.0, 0.01) * l2.steepest(rise)
            length = l2.distance(moved, 0 * x).clamp_min(torch.finfo(x.dtype).tiny)
            delta = moved * _per_image(radius / length, x)
        return found.refined(model, y, l2)


@dataclass(frozen=True)
class FMN(Attack):
    """Steps on the margin, projected to a ball that shrinks where an image fools and grows where it does not.

    Fast minimum-norm, Pintor et al. 2021 (NeurIPS), in Linf, L2 and L1. Before the first success the ball reaches a
    little farther than the boundary lies to first order. Gives the nearest iterate that is misclassified, and the clean
    image where there is none. Unlike in the authors' code, whose ball ends at that boundary, on which a linear model
    does not fool; in Linf steps follow the sign of the gradient, which finds nearer images; and at the end the way to
    the nearest adversary is halved ten times.

    Args:
        gamma: share by which the ball shrinks or grows in the first step; .001 in the last.

    Raises:
        UserError: steps or gamma out of range, a threat without a norm.
    """

    name: ClassVar[str] = "fmn"
    bounded: ClassVar[bool] = False
    nearest: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    steps: int = 200
    gamma: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.gamma < 1, lambda: f"fmn: gamma={self.gamma:g} must be between 0 and 1")
        require(
            not isinstance(self.threat, PixelLinf), lambda: f"fmn minimises a norm: linf, l2 or l1, not {self.threat}"
        )

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        threat, l2, dual = self.threat, L2(), _dual(self.threat)
        delta, found, tiny = torch.zeros_like(x), _Nearest(x), torch.finfo(x.dtype).tiny
        radius, farthest = torch.zeros_like(found.length), threat.distance(torch.maximum(x, 1 - x), 0 * x)
        for step in range(self.steps):
            x_adv = (x + delta).clamp_(0, 1)
            logits, loss, grad = value_and_grad(AttackLoss(model, margin, y), x_adv)
            length = threat.distance(x_adv, x)
            fools = fooled_in(model, logits, x_adv, y)
            found.keep(x_adv, length, fools)
            gamma = _falling(step, self.steps, self.gamma, 0.001)
            to_boundary = length + loss.abs() / dual.distance(grad, 0 * x).clamp_min(tiny)
            farther = (1 + gamma) * torch.where(found.length.isfinite(), radius, radius.maximum(to_boundary))
            radius = torch.where(fools, ((1 - gamma) * radius).minimum(found.length), farther).minimum(farthest)
            rise = grad.sign() if isinstance(threat, Linf) else grad
            moved = x_adv - x + _falling(step, self.steps, 1.0, 0.01) * l2.steepest(rise)
            delta = shortened(threat, moved, x, radius)
        return found.refined(model, y, threat)


class _Nearest:
    """The nearest misclassified images so far; at first the clean ones, at an endless distance."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.x_adv, self.length = x, x.clone(), x.new_full((len(x),), torch.inf)

    def keep(self, x_adv: Tensor, length: PerImage, fools: Tensor) -> None:
        nearer = fools & (length < self.length)
        self.x_adv = torch.where(_per_image(nearer, x_adv), x_adv, self.x_adv)
        self.length = torch.where(nearer, length, self.length)

    def refined(self, model: nn.Module, y: Labels, threat: Threat) -> Tensor:
        """Return the nearest images that fool, after a bisection of the way from the clean ones to them.

        Here the original decides, as in an evaluation: the folded twin, on which the attack has run, rounds otherwise,
        so that an image on the boundary of the one need not fool the other.
        """
        found, way = self.length.isfinite(), self.x_adv - self.x
        confirmed = _Nearest(self.x)
        near, far = torch.zeros_like(self.length), torch.zeros_like(self.length)
        for stretch in STRETCHES:
            if not (found & confirmed.length.isinf()).any():
                break
            x_adv = (self.x + stretch * way).clamp_(0, 1)
            fools = found & misclassified_by_original(model, x_adv, y)
            far = torch.where(fools & (far == 0), stretch, far)
            confirmed.keep(x_adv, threat.distance(x_adv, self.x), fools)
        for _ in range(BISECTIONS):
            middle = (near + far) / 2
            x_adv = (self.x + _per_image(middle, way) * way).clamp_(0, 1)
            fools = misclassified_by_original(model, x_adv, y)
            confirmed.keep(x_adv, threat.distance(x_adv, self.x), fools)
            near, far = torch.where(fools, near, middle), torch.where(fools, middle, far)
        return confirmed.x_adv


def _dual(threat: Threat) -> Linf | L2 | L1:
    """Return the geometry in whose norm a gradient is measured: its steepest rise for a unit of length."""
    return {"linf": L1(), "l2": L2(), "l1": Linf()}[threat.norm]


def _falling(step: int, steps: int, first: float, last: float) -> float:
    """Return a number that falls along a cosine from `first` in step 0 towards `last`."""
    return last + (first - last) * (1 + math.cos(math.pi * step / steps)) / 2


def _per_image(values: Tensor, like: Pixels) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
