"""AWP: one step up the loss in the weights before each step down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from advalign.models.modes import buffers_kept
from advalign.objectives import Objective, total
from advalign.objectives.contract import Terms
from advalign.runtime import ranks
from advalign.training.loss_scale import LossScale


@contextmanager
def adversarial_weights(
    objective: Objective, size: float, forward: Callable[[], Terms], scale: LossScale | None = None
) -> Iterator[None]:
    """Move the student's weights up the loss inside, each layer by `size` of its norm. Wu et al. 2020, eq. 9 and 10.

    Convolutions and linear layers move, BatchNorm and biases do not. The authors step a copy of the network and rescale
    the difference, which is the gradient: so here no copy is made. Running statistics are left as they were by the
    extra pass. Afterwards the same perturbation is taken off whatever the weights have become.

    Args:
        forward: runs the objective on the batch.
        scale: of fp16; a layer whose gradient it cannot hold does not move.
    """
    weights: list[Tensor] = [p for p in objective.student.parameters() if p.requires_grad and p.ndim > 1]
    with buffers_kept(objective):
        loss = ranks.own_part(total(forward()))
        loss = loss if scale is None else scale.scaled(loss)
        grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    ranks.add_up(grads)
    if scale is not None:
        grads = [torch.where(g.isfinite().all(), g, 0.0) for g in grads]
    steps = [size * w.detach().norm() / (g.norm() + 1e-20) * g for w, g in zip(weights, grads, strict=True)]
    with torch.no_grad():
        torch._foreach_add_(weights, steps)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_sub_(weights, steps)
