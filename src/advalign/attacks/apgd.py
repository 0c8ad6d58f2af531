"""Auto-PGD: ascent that finds its own step sizes, on three losses. Croce and Hein 2020 (ICML, arXiv 2003.01690)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from advalign.attacks.apgd_l1 import auto_pgd_l1
from advalign.attacks.ascent import AttackLoss, value_and_grad
from advalign.attacks.classification import fooled_in
from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.goal import Goal
from advalign.attacks.losses import cross_entropy, dlr, targeted_dlr
from advalign.attacks.targets import pairs_with_wrong_classes
from advalign.shapes import ImageBatch, Labels
from advalign.threats import L1, L2, Projection, Threat


@dataclass(frozen=True)
class APGDCE(Attack):
    """Auto-PGD on the cross entropy. Croce and Hein 2020; part of AutoAttack.

    Args:
        restarts: each attacks what withstood the one before, from a new random start.

    Raises:
        UserError: steps or restarts out of range.
    """

    name: ClassVar[str] = "apgd-ce"
    steps: int = 100
    restarts: int = 1

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _in_turn(model, [AttackLoss(model, cross_entropy, y)] * self.restarts, x, y, self.threat, self.steps)


@dataclass(frozen=True)
class APGDDLR(Attack):
    """Auto-PGD on the difference of logits ratio, which a network that is too sure does not flatten. As `apgd-ce`.

    Raises:
        UserError: steps or restarts out of range.
    """

    name: ClassVar[str] = "apgd-dlr"
    steps: int = 100
    restarts: int = 1

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _in_turn(model, [AttackLoss(model, dlr, y)] * self.restarts, x, y, self.threat, self.steps)


@dataclass(frozen=True)
class APGDT(Attack):
    """Auto-PGD towards one wrong class after another, the likeliest first. Croce and Hein 2020; part of AutoAttack.

    Args:
        targets: how many classes to try; at most all that are wrong.
        restarts: for each target.

    Raises:
        UserError: steps, targets or restarts out of range.
    """

    name: ClassVar[str] = "apgd-t"
    steps: int = 100
    targets: int = 9
    restarts: int = 1

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _in_turn(model, self._attack_losses(model, x, y), x, y, self.threat, self.steps)

    def _attack_losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[AttackLoss]:
        for pair in pairs_with_wrong_classes(model, x, y, self.targets):
            for _ in range(self.restarts):
                yield AttackLoss(model, _from_to, pair)


def _from_to(logits: Tensor, classes: Tensor) -> Tensor:
    return targeted_dlr(logits, *classes.unbind(1))


def _in_turn(
    model: nn.Module, attack_losses: Iterable[AttackLoss], x: Tensor, y: Tensor, threat: Threat, steps: int
) -> Tensor:
    """Maximise one loss after another, each with the images that are still classified correctly."""

    def attempt(attack_loss: AttackLoss, rows: Tensor) -> Tensor:
        return auto_pgd(attack_loss._replace(target=attack_loss.target[rows]), x[rows], y[rows], threat, steps=steps)

    return attack_survivors(model, x, Goal(y), (partial(attempt, attack_loss) for attack_loss in attack_losses))


def checkpoints(steps: int) -> dict[int, int]:
    """Return after which steps the step sizes are reconsidered, each with the number of steps since the last time."""
    period, shrink, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    periods, step = {}, period
    while step <= steps:
        periods[step] = period
        period = max(period - shrink, least)
        step += period
    return periods


class _Images(NamedTuple):
    """The N images that still withstand, their iterates, losses and step sizes; rows do not depend on each other."""

    rows: Tensor  # (N,) their place in the batch
    labels: Tensor  # (N,)
    target: Tensor  # (N, ...) of the attack loss
    x: Tensor  # (N, C, H, W), clean; so are the next five
    x_adv: Tensor
    earlier: Tensor  # the iterate before x_adv
    grad: Tensor  # at x_adv
    best: Tensor  # the iterate of the highest loss
    best_grad: Tensor
    loss: Tensor  # (N, 1, 1, 1), at x_adv; so are the rest
    best_loss: Tensor
    best_then: Tensor  # the best loss at the last checkpoint
    rises: Tensor  # how many steps since then have raised the loss
    halved: Tensor  # the step size, then
    step_size: Tensor


def auto_pgd(
    attack_loss: AttackLoss,
    x: ImageBatch,
    labels: Labels,
    threat: Threat,
    *,
    steps: int,
    start: ImageBatch | None = None,
) -> ImageBatch:
    """Maximise a loss from a random start, in `steps` + 1 forward and backward passes. Croce and Hein 2020, alg. 1.

    An image that leaves its class is left out, which changes nothing for the others. Costs one
    synchronisation a step. In L1 the algorithm is another one, that of `auto_pgd_l1`, in `steps` + 3 passes.

    Args:
        x: images (N, C, H, W) in [0, 1]; left as they were.
        labels: (N,) true classes.
        start: images (N, C, H, W) inside the threat model to start from; random ones if None.

    Returns:
        Of each image the first iterate that leaves its class, else the one of the highest loss; (N, C, H, W).
    """
    if isinstance(threat, L1):
        return auto_pgd_l1(attack_loss, x, labels, threat, steps=steps, start=start)
    x = x.detach()
    project, checks = threat.ball(x), checkpoints(steps)
    first = _start(x, threat) if start is None else start.detach()
    now = _begin(attack_loss, x, first, labels, 2 * threat.eps)
    result = now.x_adv.clone()
    for step in range(steps + 1):
        logits, loss, grad = value_and_grad(attack_loss._replace(target=now.target), now.x_adv)
        loss = loss.view_as(now.loss)
        # Not in the paper, but in the authors' code: the first loss is compared with 0, not with that of the start.
        rose = loss > (0 if step == 1 else now.loss)
        now = now._replace(grad=grad, loss=loss, rises=now.rises + rose)
        still = (~fooled_in(attack_loss.network, logits, now.x_adv, now.labels)).nonzero().squeeze(1)
        if len(still) < len(now.rows):
            result[now.rows] = now.x_adv
            now = _Images(*(each[still] for each in now))
            project = threat.ball(now.x)
        now = _remember(now)
        if step == steps or not len(still):
            break
        if step in checks:
            now = _reconsider(now, period=checks[step])
        now = _step(now, threat, project, momentum=0.25 if step else 0.0)
    result[now.rows] = now.best
    return result


def _start(x: Tensor, threat: Threat) -> Tensor:
    """Return x moved by noise (N, C, H, W) as long as the radius: a point of the sphere in L2, not of the ball."""
    if isinstance(threat, L2):
        noise = threat.steepest(torch.randn_like(x))
    else:
        noise = torch.rand_like(x) * 2 - 1
        noise = noise / noise.abs().amax(tuple(range(1, x.ndim)), keepdim=True)
    return threat.ball(x)(x + threat.eps * noise)


def _begin(attack_loss: AttackLoss, x: Tensor, x_adv: Tensor, labels: Tensor, step_size: float) -> _Images:
    rows, none = torch.arange(len(x), device=x.device), torch.zeros_like(x)
    zero = x.new_zeros(len(x), *[1] * (x.ndim - 1))
    # An endless loss, so that the start is no rise; as if halved, for the first checkpoint has none to compare with.
    losses = {"loss": zero + torch.inf, "best_loss": zero - torch.inf, "best_then": zero}
    steps = {"rises": zero, "halved": zero == 0, "step_size": zero + step_size}
    return _Images(rows, labels, attack_loss.target, x, x_adv, x_adv, none, x_adv, none, **losses, **steps)


def _remember(now: _Images) -> _Images:
    better = now.loss > now.best_loss
    return now._replace(
        best=torch.where(better, now.x_adv, now.best),
        best_grad=torch.where(better, now.grad, now.best_grad),
        best_loss=torch.where(better, now.loss, now.best_loss),
    )


def _reconsider(now: _Images, period: int) -> _Images:
    """Halve the step size and go back to the best iterate where too few steps rose, or where a whole step gained none.

    The latter means: the step size was not halved at the last checkpoint, and the best loss is what it was then.
    """
    halve = (now.rises <= 0.75 * period) | (~now.halved & (now.best_loss <= now.best_then))
    return now._replace(
        x_adv=torch.where(halve, now.best, now.x_adv),
        grad=torch.where(halve, now.best_grad, now.grad),
        best_then=now.best_loss,
        rises=torch.zeros_like(now.rises),
        halved=halve,
        step_size=torch.where(halve, now.step_size / 2, now.step_size),
    )


def _step(now: _Images, threat: Threat, project: Projection, momentum: float) -> _Images:
    ahead = project(now.x_adv + now.step_size * threat.steepest(now.grad))
    ahead = now.x_adv + (1 - momentum) * (ahead - now.x_adv) + momentum * (now.x_adv - now.earlier)
    return now._replace(x_adv=project(ahead), earlier=now.x_adv)
