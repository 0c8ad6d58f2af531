"""Parts that block gradients, passed by: backward pass differentiable approximation. Athalye, Carlini, Wagner 2018."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from advalign.errors import require


@final
class _PassedBy(nn.Module):
    """A part of a network whose outputs are its own, and whose gradient is that of another function."""

    def __init__(self, module: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.module, self.backward = module, backward

    def forward(self, x: Tensor) -> Tensor:
        """Map an input to the part's output, to the bit; the gradient passes through `backward` instead.

        Raises:
            UserError: the outputs of the two have different shapes.
        """
        with torch.no_grad():
            y = self.module(x)
        stand_in = x if self.backward is None else self.backward(x)
        require(
            y.shape == stand_in.shape,
            lambda: (
                f"bpda: the part maps {tuple(x.shape)} to {tuple(y.shape)} and its stand-in to "
                f"{tuple(stand_in.shape)}: give a function with the same output shape, bpda(module, backward=...)"
            ),
        )
        return _ValueOfOne.apply(y, stand_in)  # pyright: ignore[reportReturnType] (of torch's stub)


def bpda(module: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor] | None = None) -> nn.Module:
    """Return a part of a network, such as a quantisation, that no longer blocks gradients.

    Put it in the part's place and attack the network: what the part answers is unchanged. Athalye et al. 2018.

    Args:
        module: images or features to outputs, differentiable or not.
        backward: a smooth function that is near the part; the identity if None, for parts that keep the shape.

    Example:
        >>> import advalign as aa
        >>> part = aa.models.bpda(lambda x: (16 * x).round() / 16)
    """
    return _PassedBy(module, backward)


class _ValueOfOne(torch.autograd.Function):
    """The first argument's value with the second argument's gradient; not a sum of both, which would round."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, stand_in: Tensor) -> Tensor:
        return value.to(stand_in.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return None, grads[0]
