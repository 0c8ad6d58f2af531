"""The one projected-gradient loop. Training and every gradient attack of the evaluation climb through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from advalign.errors import require, unknown
from advalign.threats import Threat

Start = Literal["uniform", "gaussian", "clean"]


class Goal(NamedTuple):
    """What an attack climbs: `loss(network(x_adv), target)`, one value per image."""

    network: Callable[[Tensor], Tensor]  # (N, C, H, W) -> outputs (N, ...); a row must not depend on the others
    loss: Callable[[Tensor, Tensor], Tensor]  # (outputs, target) -> (N,)
    target: Tensor  # (N, ...): labels, or the clean logits


def start_point(x: Tensor, threat: Threat, start: Start) -> Tensor:
    """Return a new tensor where the climb begins: uniform in the ball, x + 0.001 gaussian (TRADES), or x itself.

    Raises:
        UserError: another start.
    """
    if start == "uniform":
        return threat.sample(x)
    if start == "gaussian":  # not clamped, as in the authors' code: the first step does it
        return x + 0.001 * torch.randn_like(x)
    if start == "clean":
        return x.clone()
    raise unknown("start", start, get_args(Start))


def ascend(
    goal: Goal,
    x: Tensor,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: Start,
    momentum: float = 0.0,
    labels: Tensor | None = None,
) -> Tensor:
    """Climb the goal inside the threat model around x, in `steps` forward and backward passes.

    Args:
        x: images (N, C, H, W) in [0, 1]; left as they were.
        step_size: length of a step in the threat's norm, in the unit of the pixels.
        momentum: decay of the accumulated gradient, each gradient divided by its mean absolute value
            (MI-FGSM, Dong et al. 2018); 0 is plain ascent.
        labels: (N,) true classes, where the outputs are logits and the climb serves an evaluation: an image keeps the
            first iterate that leaves its class and is climbed no further. Images are independent in eval mode, so
            dropping the fooled ones changes nothing for the others. Costs one synchronisation a step.

    Returns:
        Adversarial images (N, C, H, W), detached.

    Raises:
        UserError: fewer steps than one, which would leave a gaussian start outside the threat model; unknown start.
    """
    require(steps >= 1, f"steps={steps} must be at least 1")
    x = x.detach()
    x_adv = start_point(x, threat, start)
    project = threat.ball(x)
    velocity = torch.zeros_like(x) if momentum else None
    result, rows = x_adv.detach(), torch.arange(len(x), device=x.device)
    for step in range(steps):
        x_adv.requires_grad_()
        outputs = goal.network(x_adv)
        (grad,) = torch.autograd.grad(goal.loss(outputs, goal.target).sum(), x_adv)
        x_adv = x_adv.detach()
        kept = step > 0 or start != "gaussian"  # which may lie outside the threat model
        if labels is not None and kept and (fooled := fooled_in(goal.network, outputs, x_adv, labels)).any():
            result = result.index_copy(0, rows[fooled], x_adv[fooled])
            if fooled.all():
                return result
            still = ~fooled
            x, x_adv, grad, rows, labels = x[still], x_adv[still], grad[still], rows[still], labels[still]
            goal, project = goal._replace(target=goal.target[still]), threat.ball(x)
            velocity = velocity[still] if velocity is not None else None
        if velocity is not None:
            velocity = momentum * velocity + grad / _mean_magnitude(grad)
            grad = velocity
        x_adv = project(x_adv.add_(threat.steepest(grad), alpha=step_size))
    return result.index_copy(0, rows, x_adv) if labels is not None else x_adv


def fooled_in(network: Callable[[Tensor], Tensor], outputs: Tensor, x_adv: Tensor, labels: Tensor) -> Tensor:
    """Tell which images have left their class; under autocast, fp32 confirms it, or climbs would end too early."""
    fooled = outputs.argmax(1) != labels
    if torch.is_autocast_enabled(x_adv.device.type) and fooled.any():
        rows = fooled.nonzero().squeeze(1)
        fooled[rows] = misclassified(network, x_adv[rows], labels[rows])
    return fooled


def misclassified(network: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """Tell which images (N, C, H, W) the network takes for another class than their labels (N,), in fp32."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return network(x).argmax(1) != labels


def _mean_magnitude(grad: Tensor) -> Tensor:
    # A zero gradient must not become NaN, which would freeze the image for good.
    mean = grad.abs().mean(dim=tuple(range(1, grad.ndim)), keepdim=True)
    return mean.clamp_min(torch.finfo(grad.dtype).tiny)
