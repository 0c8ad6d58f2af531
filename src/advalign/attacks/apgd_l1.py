"""Auto-PGD in L1: sparse steps, and radii that shrink to that of the ball. Croce and Hein 2021 (arXiv 2103.01208)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from advalign.attacks.ascent import AttackLoss, value_and_grad
from advalign.attacks.classification import fooled_in
from advalign.shapes import ImageBatch, Labels
from advalign.threats import L1, sparse_sign

RADII = ((3, 3), (2, 3), (1, 4))
"""Radii, in units of the ball's, each with its tenths of the steps; the last has what the others leave."""
_LEAST_STEP = 0.1
"""The shortest step, in units of the radius."""


def auto_pgd_l1(
    attack_loss: AttackLoss,
    x: ImageBatch,
    labels: Labels,
    threat: L1,
    *,
    steps: int,
    start: ImageBatch | None = None,
) -> ImageBatch:
    """Maximise a loss in a ball of three times the radius, which shrinks in two stages.

    Each stage begins at the image of the highest loss of the one before, projected. Only in the last one an image
    that leaves its class counts. One forward and backward pass a step, and one for each of the three stages.

    Args:
        x: images (N, C, H, W) in [0, 1]; left as they were.
        labels: (N,) true classes.
        start: images (N, C, H, W) to start from; with noise everywhere if None.

    Returns:
        Of each image the first iterate that leaves its class, else the one of the highest loss; (N, C, H, W).
    """
    x = x.detach()
    best = x + torch.randn_like(x) if start is None else start.detach()
    left = steps
    for factor, tenths in RADII:
        of_stage = left if factor == 1 else steps * tenths // 10
        left -= of_stage
        wider = L1(factor * threat.eps)
        best = wider.ball(x)(best.clone())
        best = _ascend(attack_loss, x, best, labels, wider, steps=of_stage, until_fooled=factor == 1)
    return best


class _Images(NamedTuple):
    """The N images that still withstand, their iterates, losses and steps; rows do not depend on each other."""

    rows: Tensor  # (N,) their place in the batch
    labels: Tensor  # (N,)
    target: Tensor  # (N, ...) of the attack loss
    x: Tensor  # (N, C, H, W), clean; so are the next four
    x_adv: Tensor
    grad: Tensor  # at x_adv
    best: Tensor  # the iterate of the highest loss
    best_grad: Tensor
    best_loss: Tensor  # (N,), so are the rest
    share: Tensor  # of the entries that a step moves
    entries: Tensor  # how many of the best iterate differed from x at the last step
    step_size: Tensor


def _ascend(
    attack_loss: AttackLoss, x: Tensor, start: Tensor, labels: Tensor, threat: L1, *, steps: int, until_fooled: bool
) -> Tensor:
    """Maximise a loss in one ball, in `steps` + 1 passes: steps to more entries than differ now, or shorter ones.

    A step that makes the best iterate sparser by a twentieth is followed by one of the whole radius from there; else
    its length is divided by 1.5.
    """
    project = threat.ball(x)
    now, result = _begin(attack_loss, x, start, labels, threat.eps), start.clone()
    for step in range(steps + 1):
        logits, loss, grad = value_and_grad(attack_loss._replace(target=now.target), now.x_adv)
        now = _remember(now._replace(grad=grad), loss)
        if until_fooled:
            still = (~fooled_in(attack_loss.network, logits, now.x_adv, now.labels)).nonzero().squeeze(1)
            if len(still) < len(now.rows):
                result[now.rows] = now.x_adv
                now = _Images(*(each[still] for each in now))
                project = threat.ball(now.x)
        if step == steps or not len(now.rows):
            break
        if step:
            now = _reconsider(now, threat.eps)
        moved = now.x_adv + _like(now.step_size, x) * sparse_sign(now.grad, now.share)
        now = now._replace(x_adv=project(moved))
    result[now.rows] = now.best
    return result


def _begin(attack_loss: AttackLoss, x: Tensor, start: Tensor, labels: Tensor, eps: float) -> _Images:
    none, each = torch.zeros_like(x), x.new_ones(len(x))
    entries = _differing(start, x)
    steps = {"share": entries / (1.5 * x[0].numel()), "entries": entries, "step_size": eps * each}
    rows = torch.arange(len(x), device=x.device)
    return _Images(
        rows,
        labels,
        attack_loss.target,
        x,
        start,
        none,
        best=start,
        best_grad=none,
        best_loss=-torch.inf * each,
        **steps,
    )


def _remember(now: _Images, loss: Tensor) -> _Images:
    better = loss > now.best_loss
    return now._replace(
        best=torch.where(_like(better, now.x), now.x_adv, now.best),
        best_grad=torch.where(_like(better, now.x), now.grad, now.best_grad),
        best_loss=torch.where(better, loss, now.best_loss),
    )


def _reconsider(now: _Images, eps: float) -> _Images:
    entries = _differing(now.best, now.x)
    sparser = entries < 0.95 * now.entries
    back = _like(sparser, now.x)
    return now._replace(
        x_adv=torch.where(back, now.best, now.x_adv),
        grad=torch.where(back, now.best_grad, now.grad),
        share=entries / (1.5 * now.x[0].numel()),
        entries=entries,
        step_size=torch.where(sparser, eps, now.step_size / 1.5).clamp_(_LEAST_STEP * eps, eps),
    )


def _differing(x_adv: Tensor, x: Tensor) -> Tensor:
    return (x_adv != x).flatten(1).sum(1).to(x.dtype)


def _like(values: Tensor, images: Tensor) -> Tensor:
    return values.view(-1, *[1] * (images.ndim - 1))
