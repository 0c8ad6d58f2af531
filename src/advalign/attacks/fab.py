"""FAB, untargeted and targeted: walks along the decision boundary towards the clean image. Croce and Hein 2020."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks.ascent import warn_of_no_gradient
from advalign.attacks.classification import misclassified
from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.goal import Goal
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels, PerImage
from advalign.threats import L1, PixelLinf, Pixels, Threat

_NEWTON = 100
"""Steps at most in the search for a length; rounding may keep the last ones apart by the smallest number."""


@dataclass(frozen=True)
class FAB(Attack):
    """Step onto the nearest of all boundaries, linearised, with a bias to the clean image. Croce and Hein 2020.

    Each step costs 2 forward passes and K - 1 backward passes, for K classes.

    Args:
        restarts: the first run begins at the clean image, the others anywhere in the ball of half the radius.
        alpha_max: the largest weight of the step from the clean image, against the one from the current point.
        eta: how far to step, 1 being onto the boundary.
        beta: an adversarial point is drawn back to this share of its distance from the clean image.

    Raises:
        UserError: an argument out of range, or a threat without a norm.
    """

    name: ClassVar[str] = "fab"
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return images within eps, clean ones where it fails."""
        return _attack(self, model, x, y, lambda rivals: [rivals])


@dataclass(frozen=True)
class FABT(Attack):
    """FAB towards one class after another, the most likely first: the one of AutoAttack, Croce and Hein 2020.

    Each step costs 2 forward passes and a backward pass, whatever the number of classes.

    Args:
        targets: how many classes, or all but the true one where there are fewer; each has `restarts` runs.

    The other arguments and what is raised are those of `FAB`.
    """

    name: ClassVar[str] = "fab-t"
    steps: int = 100
    restarts: int = 1
    targets: int = 9
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return images within eps, clean ones where it fails."""
        return _attack(self, model, x, y, lambda rivals: rivals[:, : self.targets].split(1, 1))


def _check(attack: FAB | FABT) -> None:
    name, threat = attack.name, attack.threat
    require(not isinstance(threat, PixelLinf), lambda: f"{name} minimises a norm: linf, l2 or l1, not {threat}")
    require(0 <= attack.alpha_max <= 1, lambda: f"{name}: alpha_max={attack.alpha_max} must be in [0, 1]")
    require(attack.eta >= 1, lambda: f"{name}: eta={attack.eta} must be at least 1")
    require(0 < attack.beta <= 1, lambda: f"{name}: beta={attack.beta} must be above 0 and at most 1")


def _attack(
    attack: FAB | FABT, model: nn.Module, x: Tensor, y: Tensor, runs: Callable[[Tensor], Sequence[Tensor]]
) -> Tensor:
    """Attack what is still robust, once for each group (N, R) of the wrong classes (N, K - 1), likeliest first."""
    half = replace(attack.threat, eps=attack.threat.eps / 2)

    def attempt(group: Tensor, restart: int, rows: Tensor) -> Tensor:
        start = half.sample(x[rows]) if restart else x[rows]
        return _run(attack, model, x[rows], y[rows], group[rows], start)

    # In fp32 under autocast as well: with logits in bf16, 40 images of 200 were broken instead of 50 (docs/attacks.md).
    with torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            rivals = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
        attempts = [partial(attempt, group, restart) for group in runs(rivals) for restart in range(attack.restarts)]
        return attack_survivors(model, x, Goal(y), attempts)


def _run(attack: FAB | FABT, model: nn.Module, x: Tensor, y: Tensor, rivals: Tensor, x_adv: Tensor) -> Tensor:
    """Return the first adversarial image within eps on the walk from x_adv, else x.

    The authors walk on for the least distance; here only eps counts, so that such an image leaves the batch.
    """
    threat = attack.threat
    result, rows = x.clone(), torch.arange(len(x), device=x.device)
    nearest, least = x, torch.full_like(x.flatten(1)[:, 0], torch.inf)
    for _ in range(attack.steps):
        x_adv = _step(attack, model, x, y, rivals, x_adv)
        fooled = misclassified(model, x_adv, y)
        distance = threat.distance(x_adv, x)
        closer = fooled & (distance < least)
        nearest, least = torch.where(_per_image(closer, x), x_adv, nearest), torch.where(closer, distance, least)
        if (within := fooled & (distance <= threat.eps)).any():
            result[rows[within]] = x_adv[within]
            if within.all():
                return result
            still = ~within
            x, y, rivals, rows, x_adv = x[still], y[still], rivals[still], rows[still], x_adv[still]
            nearest, least, fooled = nearest[still], least[still], fooled[still]
        x_adv = torch.where(_per_image(fooled, x), x + attack.beta * (x_adv - x), x_adv)
    return result.index_copy(0, rows, _within(threat, model, x, y, nearest))


def _within(threat: Threat, model: nn.Module, x: Tensor, y: Tensor, nearest: Tensor) -> Tensor:
    """Search between x and its nearest adversarial, which is further than eps: the point at eps if it fools, else x.

    The paper's final search looks for the least distance on that line; the authors' code of today has none.
    """
    nearest = threat.ball(x)(nearest.clone())
    return torch.where(_per_image(misclassified(model, nearest, y), x), nearest, x)


def _step(attack: FAB | FABT, model: nn.Module, x: Tensor, y: Tensor, rivals: Tensor, x_adv: Tensor) -> Tensor:
    """Step over the nearest boundary, by eta, from x_adv and a little from x: algorithm 1 of the paper."""
    threat, eta = attack.threat, attack.eta
    w, gap = _nearest_boundary(threat, model, x_adv, y, rivals)
    from_adv = onto_plane(threat, x_adv, w, gap)
    from_x = onto_plane(threat, x, w, gap + _dot(w, x_adv - x))
    far, near = threat.distance(from_adv, x_adv), threat.distance(from_x, x)
    tiny = torch.finfo(x.dtype).tiny
    alpha = _per_image((far / (far + near).clamp_min(tiny)).clamp_max(attack.alpha_max), x)
    moved = (1 - alpha) * (x_adv + eta * (from_adv - x_adv)) + alpha * (x + eta * (from_x - x))
    return moved.clamp_(0, 1)


def _nearest_boundary(
    threat: Threat, model: nn.Module, x_adv: Tensor, y: Tensor, rivals: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the plane {z: <w, z - x_adv> = gap} where the nearest of the rivals (N, R) ties with y, to first order.

    One backward pass a rival, over one graph; only the nearest plane so far is held, so that memory does not grow
    with the number of classes as it would with a batched vector-Jacobian product.
    """
    x_adv = x_adv.detach().requires_grad_()
    logits = model(x_adv).to(x_adv.dtype)
    if not logits.requires_grad:
        warn_of_no_gradient()
        return torch.zeros_like(x_adv), torch.zeros_like(logits[:, 0])
    w, gap = torch.zeros_like(x_adv), torch.zeros_like(logits[:, 0])
    least = torch.full_like(gap, torch.inf)
    for rival in rivals.T:
        lead = (logits.gather(1, rival[:, None]) - logits.gather(1, y[:, None])).squeeze(1)
        (grad,) = torch.autograd.grad(lead.sum(), x_adv, retain_graph=True, allow_unused=True)
        grad = torch.zeros_like(x_adv) if grad is None else grad.nan_to_num(0.0, 0.0, 0.0)
        # The gain per unit of length along the steepest direction is the dual norm: for Linf that of L1.
        distance = lead.detach().abs() / _dot(grad, threat.steepest(grad)).clamp_min(torch.finfo(gap.dtype).tiny)
        closer = distance < least
        least, gap = torch.where(closer, distance, least), torch.where(closer, -lead.detach(), gap)
        w = torch.where(_per_image(closer, x_adv), grad, w)
    return w, gap


def onto_plane(threat: Threat, x: Pixels, w: Pixels, gap: PerImage) -> Pixels:
    """Return the nearest point z to x in [0, 1] with <w, z - x> = gap; where there is none, the corner nearest to that.

    The nearest point lies on the path along the steepest direction that each coordinate leaves at its wall:
    z(t) = clamp(x + t u, 0, 1), for Linf with u = sign(w), for L2 with u = w / ||w||, as the conditions of Karush, Kuhn
    and Tucker give. On it <w, z - x> grows piecewise linearly and ever more slowly, so that Newton's method reaches t
    from below, in as many steps as it meets pieces: fewer than ten for images, which is cheaper than to sort the walls.
    In L1 the entries go to their walls one after another, that of the largest weight first.

    Args:
        x: images (N, C, H, W) in [0, 1].
        w: normals of x's shape; where w is zero, x is returned.
        gap: (N,).
    """
    w = torch.where(_per_image(gap < 0, x), -w, w)
    if isinstance(threat, L1):
        return _entry_by_entry(x, w, gap.abs())
    direction = threat.steepest(w)
    room = torch.where(direction > 0, 1 - x, x).flatten(1)
    walls = room / direction.flatten(1).abs().clamp_min(torch.finfo(x.dtype).tiny)
    gain, gap = (w * direction).flatten(1), gap.abs()
    length = torch.zeros_like(gap)
    for _ in range(_NEWTON):
        reached = (gain * walls.minimum(length[:, None])).sum(1)
        speed = (gain * (walls > length[:, None])).sum(1)  # exactly 0 once all have stopped
        further = torch.where(speed > 0, length + (gap - reached) / speed, length)
        if not (further > length).any():
            break
        length = length.maximum(further)
    return (x + _per_image(length, x) * direction).clamp_(0, 1)


def _entry_by_entry(x: Pixels, w: Pixels, gap: PerImage) -> Pixels:
    """Return x with those entries moved that gain most for their length, until they have gained the gap (N,)."""
    weights, order = w.flatten(1).abs().sort(1, descending=True)
    signs = w.flatten(1).gather(1, order).sign()
    values = x.flatten(1).gather(1, order)
    room = torch.where(signs > 0, 1 - values, values)
    gains = (weights * room).double()
    before = gains.cumsum(1) - gains
    share = ((gap[:, None] - before) / gains.clamp_min(torch.finfo(x.dtype).tiny)).clamp_(0, 1).to(x.dtype)
    moved = values + share * room * signs
    return torch.empty_like(moved).scatter_(1, order, moved).view_as(x).clamp_(0, 1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
