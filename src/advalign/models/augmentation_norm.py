"""One BatchNorm for the first augmentation of a batch and another for the others. Addepalli et al. 2022."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advalign.errors import require
from advalign.models.modes import setting
from advalign.models.split_norm import SplitNorm, replace_modules


@final
class AugmentationNorm(nn.Module):
    """Two copies of a BatchNorm: one for the first of the augmentations that a batch holds, one for all others.

    Each augmentation is a batch of its own, with statistics of its own. Outside of `using_augmentations`, a batch is
    one, and the first norm runs.
    """

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.first, self.others = norm, copy.deepcopy(norm)
        self.augmentations = 1

    def forward(self, x: Float[Tensor, "N C *rest"]) -> Float[Tensor, "N C *rest"]:
        """Normalise (N, C, ...), which holds all images in the first augmentation, then all in the next."""
        if self.augmentations == 1:
            return self.first(x)
        batches = x.tensor_split(self.augmentations)
        others = [self.others(batches[k]) for k in range(1, self.augmentations)]  # torch.fx can index, not iterate
        return torch.cat([self.first(batches[0]), *others])


def using_augmentations(net: nn.Module, augmentations: int) -> AbstractContextManager[None]:
    """Let the norms of a network take each batch for so many augmentations of the same images inside."""
    return setting(net, AugmentationNorm, "augmentations", augmentations)


def with_augmentation_norms(net: nn.Module) -> nn.Module:
    """Put an `AugmentationNorm` in the place, and under the name, of every BatchNorm of a network; both begin equal.

    Raises:
        UserError: the network has no BatchNorm, or its BatchNorms are doubled already.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    doubled = any(isinstance(module, SplitNorm | AugmentationNorm) for module in net.modules())
    require(not doubled, lambda: f"the BatchNorms of {type(net).__name__} are doubled already: take a fresh network")
    require(bool(norms), lambda: f"{type(net).__name__} has no BatchNorm to double for other augmentations")
    replace_modules(net, {norm: AugmentationNorm(norm) for norm in norms})
    return net


def with_first_norms(net: nn.Module) -> nn.Module:
    """Return a copy of a network that has the first augmentation's norms alone, under the names they had before."""
    net = copy.deepcopy(net)
    norms = [module for module in net.modules() if isinstance(module, AugmentationNorm)]
    replace_modules(net, {norm: norm.first for norm in norms})
    return net
