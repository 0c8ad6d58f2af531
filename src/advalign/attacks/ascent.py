"""Projected gradient ascent: the loop of training, FGSM, PGD and MIM, and the loss and gradient of a single step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from advalign.attacks.goal import Goal
from advalign.errors import require, unknown
from advalign.runtime import ranks
from advalign.runtime.device import autocast_type, without_autocast
from advalign.shapes import ImageBatch
from advalign.threats import Threat, ascent_step

Start = Literal["uniform", "unclamped", "gaussian", "clean"]
TrainingStart = Literal[Start, "wide"]
WIDE = 2
"""How many times as far as the ball a wide start may lie."""


class AttackLoss(NamedTuple):
    """The loss that an attack maximises: `loss(network(x_adv), target)`, one value per image."""

    network: Callable[[Tensor], Tensor]  # (N, C, H, W) -> outputs (N, ...); a row must not depend on the others
    loss: Callable[[Tensor, Tensor], Tensor]  # (outputs, target) -> (N,)
    target: Tensor  # (N, ...): labels, or the clean logits
    flat_at_clean: bool = False  # no gradient at the clean images, where the loss is least: start elsewhere


class NoGradient(UserWarning):
    """The outputs do not depend on the image, as far as autograd knows."""


class ValueAndGrad(NamedTuple):
    """An attack loss at some images, with its gradient: one forward and one backward pass."""

    outputs: Tensor  # (N, ...), in fp32 at least, without a graph
    loss: Tensor  # (N,)
    grad: Tensor  # (N, C, H, W): the gradient of the loss, in fp16 up to a positive factor for each image; finite


def value_and_grad(attack_loss: AttackLoss, x_adv: ImageBatch) -> ValueAndGrad:
    """Return the outputs, the loss and its gradient at images (N, C, H, W) in [0, 1].

    Where the gradient is not finite, or the graph is cut, it counts as zero: the attack goes on with what it has.
    """
    x_adv = x_adv.detach().requires_grad_()
    outputs = attack_loss.network(x_adv)
    half = outputs.dtype == torch.float16 or autocast_type(x_adv.device) == torch.float16
    # Losses in fp32: in bf16 most steps would seem to leave them as they were.
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    leaf = outputs.detach().requires_grad_() if half else outputs
    loss = attack_loss.loss(leaf, attack_loss.target)
    grad = None
    if not outputs.requires_grad:
        warn_of_no_gradient()
    elif half:
        # What a sure network's softmax hands back is below all that fp16 can hold, so each image's is brought near 1.
        (pull,) = torch.autograd.grad(loss.sum(), leaf)
        size = pull.flatten(1).abs().amax(1).clamp_min(torch.finfo(pull.dtype).tiny)
        pull = pull / size.view(-1, *[1] * (pull.ndim - 1))
        (grad,) = torch.autograd.grad(outputs, x_adv, pull, allow_unused=True)
    else:
        (grad,) = torch.autograd.grad(loss.sum(), x_adv, allow_unused=True)
    grad = torch.zeros_like(x_adv) if grad is None else grad
    values = ValueAndGrad(outputs.detach(), loss.detach(), grad)
    if autocast_type(x_adv.device) == torch.float16:
        values = _mended(attack_loss, x_adv.detach(), values)
    return values._replace(grad=values.grad.nan_to_num(0.0, 0.0, 0.0))


def warn_of_no_gradient() -> None:
    """Warn a caller of the attack itself; an evaluation reports it among its own warnings."""
    text = "the model's outputs have no gradient by the image: an attack that needs one stays at its start"
    warnings.warn(text, NoGradient, stacklevel=4)


def _mended(attack_loss: AttackLoss, x_adv: Tensor, values: ValueAndGrad) -> ValueAndGrad:
    """Compute again in fp32 the gradients that fp16 could not hold: those that are zero or not finite."""
    grad = values.grad.flatten(1)
    lost = ~(grad.isfinite().all(1) & (grad != 0).any(1))
    if not lost.any():
        return values
    rows = lost.nonzero().squeeze(1)
    with ranks.alone(), without_autocast(x_adv.device):  # other ranks may have nothing to compute again
        again = value_and_grad(attack_loss._replace(target=attack_loss.target[rows]), x_adv[rows])
    return ValueAndGrad(
        *(whole.index_copy(0, rows, part.to(whole.dtype)) for whole, part in zip(values, again, strict=True))
    )


def start_point(x: ImageBatch, threat: Threat, start: TrainingStart) -> ImageBatch:
    """Return the start of an attack, a new tensor: uniform in the ball, x + 0.001 gaussian (TRADES), or x itself.

    A uniform one is clamped to [0, 1], unless it is `unclamped` (ARD, IAD). A `wide` one is uniform in twice the ball,
    and only [0, 1] bounds the single step from there (N-FGSM, de Jorge et al. 2022).

    Raises:
        UserError: another start.
    """
    if start == "uniform":
        return threat.sample(x)
    if start == "unclamped":
        return threat.draw(x)
    if start == "gaussian":  # not clamped, as in the authors' code: the first step does it
        return x + 0.001 * ranks.draw(torch.randn_like, x)
    if start == "clean":
        return x.clone()
    if start == "wide":
        return (x + WIDE * (threat.draw(x) - x)).clamp_(0, 1)
    raise unknown("start", start, get_args(TrainingStart))


def projected_gradient_ascent(
    attack_loss: AttackLoss,
    x: ImageBatch,
    threat: Threat,
    *,
    steps: int,
    step_size: float,
    start: TrainingStart | Tensor,
    momentum: float = 0.0,
    goal: Goal | None = None,
) -> ImageBatch:
    """Maximise the attack loss inside the threat model around x, in `steps` forward and backward passes.

    Args:
        x: images (N, C, H, W) in [0, 1]; left as they were.
        step_size: length of a step in the threat's norm, in the unit of the pixels.
        start: a kind of start, or the images (N, C, H, W) to start from.
        momentum: decay of the accumulated gradient, each gradient divided by its mean absolute value
            (MI-FGSM, Dong et al. 2018); 0 is plain ascent.
        goal: for an evaluation whose outputs are logits: an image keeps the first iterate that reaches its goal, and
            is then left out. Images are independent in eval mode, so leaving some out changes nothing for the others.
            Costs one synchronisation a step.

    Returns:
        Adversarial images (N, C, H, W), detached.

    Raises:
        UserError: fewer steps than one, which would leave a gaussian start outside the threat model; more than one
            from a wide start; unknown start.
    """
    require(steps >= 1, lambda: f"steps={steps} must be at least 1")
    kind = start if isinstance(start, str) else "given"
    require(kind != "wide" or steps == 1, lambda: f"steps={steps} must be 1 from start=wide, which nothing bounds")
    x = x.detach()
    x_adv = start_point(x, threat, start) if isinstance(start, str) else start.detach().clone()
    project = _into_box if kind == "wide" else threat.ball(x)
    velocity = torch.zeros_like(x) if momentum else None
    result, rows = x_adv.detach(), torch.arange(len(x), device=x.device)
    for step in range(steps):
        outputs, _, grad = value_and_grad(attack_loss, x_adv)
        kept = step > 0 or kind in ("uniform", "clean")  # the others may lie outside the threat model
        if goal is not None and kept and (there := goal.reached(attack_loss.network, outputs, x_adv)).any():
            result = result.index_copy(0, rows[there], x_adv[there])
            if there.all():
                return result
            still = ~there
            x, x_adv, grad, rows, goal = x[still], x_adv[still], grad[still], rows[still], goal.take(still)
            attack_loss, project = attack_loss._replace(target=attack_loss.target[still]), threat.ball(x)
            velocity = velocity[still] if velocity is not None else None
        if velocity is not None:
            velocity = momentum * velocity + grad / _mean_magnitude(grad)
            grad = velocity
        x_adv = project(x_adv.add_(ascent_step(threat, grad), alpha=step_size))
    return result.index_copy(0, rows, x_adv) if goal is not None else x_adv


def _into_box(x_adv: Tensor) -> Tensor:
    return x_adv.clamp_(0, 1)


def _mean_magnitude(grad: Tensor) -> Tensor:
    # A zero gradient must not become NaN, which would freeze the image for good.
    mean = grad.abs().mean(dim=tuple(range(1, grad.ndim)), keepdim=True)
    return mean.clamp_min(torch.finfo(grad.dtype).tiny)
