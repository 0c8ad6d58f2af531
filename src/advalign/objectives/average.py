"""The average of the student that a plug-in keeps: it follows the weights, and may be handed back to them."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from advalign.errors import require, shorten
from advalign.objectives.method import Method, PlugIn


def check_partner(method: Method, keeper: PlugIn, nets: nn.ModuleDict) -> None:
    """Refuse a learner that cannot be averaged with the student.

    Raises:
        UserError: it has another architecture.
    """
    if keeper.partner is None:
        return
    mine, its = ([each.shape for each in _averaged(nets[name])] for name in ("student", keeper.partner))
    require(
        mine == its,
        lambda: (
            f"{shorten(str(method))}: {keeper.name!r} averages the student with the {keeper.partner} model, so both "
            "must have one architecture"
        ),
    )


@torch.no_grad()
def follow(keeper: PlugIn, nets: nn.ModuleDict) -> None:
    """Move the average towards the student, or towards the student and its partner in their shares."""
    average, source = _averaged(nets["ema"]), _averaged(nets["student"])
    if keeper.partner is not None:
        source = torch._foreach_lerp(_averaged(nets[keeper.partner]), source, keeper.student_share())
    share = 1 - keeper.average_decay()
    torch._foreach_lerp_(average, source, [share] * len(average) if isinstance(share, Tensor) else share)


@torch.no_grad()
def hand_back(keeper: PlugIn, nets: nn.ModuleDict) -> None:
    """Make the average the student's weights and statistics, and its partner's."""
    for name in filter(None, ("student", keeper.partner)):
        torch._foreach_copy_(_averaged(nets[name]), _averaged(nets["ema"]))


def _averaged(net: nn.Module) -> list[Tensor]:
    """Return what an average of a network follows: weights, and statistics of BatchNorm."""
    return [tensor for tensor in chain(net.parameters(), net.buffers()) if tensor.is_floating_point()]
