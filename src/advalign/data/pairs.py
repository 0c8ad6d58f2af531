"""Images as callers have them: the package's own, or a pair of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from advalign.data.images import Dataset, Images
from advalign.errors import UserError, require

HINTS: dict[type, str] = {
    DataLoader: "; of a DataLoader: x, y = (torch.cat(parts) for parts in zip(*loader))",
    Dataset: "; of a Dataset: dataset.test",
}


def as_images(images: Any) -> Images:
    """Take images with labels as `Images`, or as a pair (x, y): floats (N, C, H, W), or uint8, and labels (N,).

    Raises:
        UserError: anything else, or no image.
    """
    if isinstance(images, tuple | list) and len(images) == 2 and all(isinstance(part, Tensor) for part in images):
        images = _paired(*images)
    if not isinstance(images, Images):
        hint = next((hint for kind, hint in HINTS.items() if isinstance(images, kind)), "")
        raise UserError(
            "images must be advalign.data.Images, or a pair (x, y) of tensors, floats (N, C, H, W) in [0, 1] and "
            f"labels (N,), not {type(images).__name__}{hint}"
        )
    require(len(images) > 0, "there are no images")
    return images


def _paired(x: Tensor, y: Tensor) -> Images:
    whole = not (y.is_floating_point() or y.is_complex() or y.dtype == torch.bool)
    fits = x.ndim == 4 and y.shape == x.shape[:1] and whole and (x.is_floating_point() or x.dtype == torch.uint8)
    require(
        fits,
        lambda: (
            f"a pair (x, y) must be floats (N, C, H, W) and whole-numbered labels (N,), not {x.dtype} {tuple(x.shape)} "
            f"and {y.dtype} {tuple(y.shape)}"
        ),
    )
    return Images(x.detach(), y.long())
