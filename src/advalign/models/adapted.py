"""A network as attacks and evaluations call it: it leaves its input as it was, and may compute in any numeric type."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from advalign.errors import UserError
from advalign.runtime.device import autocast_type
from advalign.shapes import ImageBatch


def number_type(net: nn.Module) -> torch.dtype | None:
    """Return the floating-point type that a network reads: that of its first parameter or buffer, None without any."""
    tensors = chain(net.parameters(), net.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


@final
class Adapted(nn.Module):
    """A network that reads images of any floating-point type, leaves them as they were, and gives logits in fp32.

    The network gets a copy in its own type, since its forward may work in place on what it reads. Logits in half
    precision are raised to fp32, but under the caller's autocast; those of a float64 network stay float64. Gradients by
    logits in fp16 are brought near 1, image by image: what the softmax of a confident network hands back is less than
    fp16 can hold. A gradient by the image is then right up to a positive factor.
    """

    net: nn.Module

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @property
    def reads(self) -> torch.dtype | None:
        """The floating-point type that the network reads, None if it has no parameters."""
        return number_type(self.net)

    def forward(self, x: ImageBatch) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, K).

        Raises:
            UserError: the network gives something else than a tensor.
        """
        logits = self.net(x.to(self.reads or x.dtype, copy=True))
        if not isinstance(logits, Tensor):
            raise UserError(f"the model must return logits, a tensor (N, K), not {type(logits).__name__}")
        if autocast_type(x.device) is not None:
            return logits
        if logits.dtype == torch.float16:
            return _RaisedFromFP16.apply(logits)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


def adapted(model: Callable[[Tensor], Any]) -> Adapted:
    """Return a network, or a function from images to logits, as attacks and evaluations call it."""
    if isinstance(model, Adapted):
        return model
    return Adapted(model if isinstance(model, nn.Module) else _Function(model).eval())


class _Function(nn.Module):
    """A function as a module; who wrote it answers for the mode of the networks that it calls."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class _RaisedFromFP16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        size = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        return (grad / size.view(-1, *[1] * (grad.ndim - 1))).half()
