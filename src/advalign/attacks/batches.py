"""A batch as attacks compute on it, in fp32 at least, and their result in the numeric type of the caller's images."""

from __future__ import annotations

import torch
from torch import Tensor

from advalign.errors import UserError, require
from advalign.threats import Threat, check_images


def prepared(x: object, y: object, reads: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return a copy of images (N, ...) to compute on, and their labels (N,) as int64.

    In fp32 at least, and in float64 where the network reads that. Images outside [0, 1] by rounding are clamped.

    Args:
        reads: the floating-point type of the network.

    Raises:
        UserError: no tensors of images and one label each; images outside [0, 1].
    """
    x, y = _tensors(x, y)
    check_images(x)
    x, y = widened(x, y, reads)
    return x.clone().clamp_(0, 1), y.clone()


def widened(x: Tensor, y: Tensor, reads: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return images and labels in the types to compute in, as tensors of which a graph may be built; unchecked.

    Args:
        reads: the floating-point type of the network.
    """
    x, y = (part.clone() if part.is_inference() else part.detach() for part in (x, y))
    wide = torch.promote_types(x.dtype, torch.float64 if reads == torch.float64 else torch.float32)
    return x.to(wide), y.to(x.device, torch.int64)


def _tensors(x: object, y: object) -> tuple[Tensor, Tensor]:
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        raise UserError(
            f"images and labels must be tensors, not {type(x).__name__} and {type(y).__name__}: "
            "torch.as_tensor makes one of an array"
        )
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    require(
        whole and x.ndim >= 2 and y.shape == x.shape[:1],
        lambda: (
            f"labels must be whole numbers (N,), one for each of the {len(x) if x.ndim else 0} images, "
            f"not {str(y.dtype).removeprefix('torch.')} {tuple(y.shape)}"
        ),
    )
    return x, y


def in_type_of(x: Tensor, x_adv: Tensor, threat: Threat | None) -> Tensor:
    """Return adversarial images in the type of the clean ones, inside the threat model; None has no bound.

    Where rounding moves a pixel out, the next number towards the clean pixel takes its place.
    """
    if x_adv.dtype == x.dtype:
        return x_adv
    rounded = x_adv.to(x.dtype) + 0.0  # no -0, whose bits are not next to those of the smallest number
    if threat is None:
        return rounded
    clean = x.to(x_adv.dtype).clamp_(0, 1)
    outside = threat.ball(clean)(rounded.to(x_adv.dtype, copy=True)) != rounded
    bits = rounded.view(torch.int16 if x.element_size() == 2 else torch.int32)
    bits += torch.where(outside, (rounded < x).to(bits.dtype) - (rounded > x).to(bits.dtype), 0)
    return rounded
