"""BatchNorm's running statistics: how fast they move, and their estimation anew for weights that are an average."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advalign.models.adapted import number_type
from advalign.models.synced_norm import average_statistics


def set_norm_momentum(net: nn.Module, momentum: float) -> None:
    """Let each batch count this much, above 0 and at most 1, in the running statistics of all norms."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.momentum = momentum


@torch.no_grad()
def estimate_norm_statistics(net: nn.Module, batches: Iterable[Tensor]) -> None:
    """Estimate the statistics of the norms in train mode as the mean over batches (N, C, H, W), all of equal weight.

    Izmailov et al. 2018. Nothing is run if the network has no such norm.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm) and module.training]
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the cumulative mean
    for x in batches if norms else ():
        net(x.to(number_type(net) or x.dtype))
    for norm, was in zip(norms, momentum, strict=True):
        norm.momentum = was
    average_statistics(net)
