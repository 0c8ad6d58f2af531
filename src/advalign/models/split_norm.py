"""One BatchNorm for clean images and another for adversarial ones, sharing every other weight. Xie et al. 2020."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advalign.errors import require
from advalign.models.modes import setting

View = Literal["clean", "adv"]


@final
class SplitNorm(nn.Module):
    """Two copies of a BatchNorm; `using_norms` chooses which one runs; the adversarial one by default."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.clean, self.adv = norm, copy.deepcopy(norm)
        self.view: View = "adv"

    def forward(self, x: Float[Tensor, "N C *rest"]) -> Float[Tensor, "N C *rest"]:
        """Normalise (N, C, ...) by the copy of the chosen view."""
        return self.clean(x) if self.view == "clean" else self.adv(x)


def using_norms(net: nn.Module, view: View) -> AbstractContextManager[None]:
    """Let the split norms of a network run as `view` inside."""
    return setting(net, SplitNorm, "view", view)


def split_norms(net: nn.Module) -> nn.Module:
    """Put a `SplitNorm` in the place, and under the name, of every BatchNorm of a network; the copies begin equal.

    Raises:
        UserError: the network has no BatchNorm.
    """
    norms = [module for module in net.modules() if isinstance(module, _BatchNorm)]
    split = any(isinstance(module, SplitNorm) for module in net.modules())
    require(
        not split, lambda: f"the BatchNorms of {type(net).__name__} are split by view already: take a fresh network"
    )
    require(bool(norms), lambda: f"{type(net).__name__} has no BatchNorm to split by view")
    replace_modules(net, {norm: SplitNorm(norm) for norm in norms})
    return net


def merged(net: nn.Module, view: View) -> nn.Module:
    """Return a copy of a network that has one of each two norms, under the names it had before the split."""
    net = copy.deepcopy(net)
    split = [module for module in net.modules() if isinstance(module, SplitNorm)]
    replace_modules(net, {norm: norm.clean if view == "clean" else norm.adv for norm in split})
    return net


def replace_modules(net: nn.Module, by: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others of a network, under each of their names."""
    for parent in list(net.modules()):
        for name, child in list(parent._modules.items()):
            if child in by:
                setattr(parent, name, by[child])
