"""A network as attacks and evaluations call it: it leaves its input as it was, and may compute in any numeric type."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import chain
from typing import Any, final

import torch
from torch import Tensor, nn

from advalign.errors import UserError
from advalign.runtime.device import autocast_type
from advalign.shapes import ImageBatch

_CHANNELS = (1, 3, 4)  # of images in files


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
            UserError: the network gives something else than a tensor; the images are channels last, or of another type
                than the networks that a function calls.
        """
        try:
            logits = self.net(x.to(self.reads or x.dtype, copy=True))
        except RuntimeError as error:
            self._explain(x, error)
            raise
        if not isinstance(logits, Tensor):
            raise UserError(f"the model must return logits, a tensor (N, K), not {type(logits).__name__}")
        if autocast_type(x.device) is not None:
            return logits
        if logits.dtype == torch.float16:
            return _RaisedFromFP16.apply(logits)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _explain(self, x: ImageBatch, error: RuntimeError) -> None:
        """Name the reason why the network fails on images (N, C, H, W), if it is one of those that users meet."""
        n, c, h, w = x.shape
        if w in _CHANNELS and c not in _CHANNELS:
            raise UserError(
                f"the model cannot read images {(n, c, h, w)}: if they are (N, H, W, C), give x.permute(0, 3, 1, 2)"
            ) from error
        dtype = self.net.find_type(x[:1]) if isinstance(self.net, _Function) else None
        if dtype is not None:
            raise UserError(
                f"the model is a function that reads {dtype}, and the images are {x.dtype}: convert them in it, as in "
                f"lambda x: net(x.to({dtype}))"
            ) from error


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

    def find_type(self, x: ImageBatch) -> torch.dtype | None:
        """Return another type of images (N, C, H, W) than theirs with which the function works, None without any."""
        for dtype in {torch.float16, torch.bfloat16, torch.float32, torch.float64} - {x.dtype}:
            with suppress(RuntimeError):
                self.function(x.to(dtype))
                return dtype
        return None


class _RaisedFromFP16(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        size = grad.flatten(1).abs().amax(1).clamp_min(torch.finfo(grad.dtype).tiny)
        return (grad / size.view(-1, *[1] * (grad.ndim - 1))).half()
