"""Images as callers have them: the package's own, or a pair of tensors or arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from advalign.data.images import Dataset, Images
from advalign.data.stored import StoredImages
from advalign.errors import UserError, require

Array = Tensor | NDArray[Any]
Pair = tuple[Array, Array]
HINTS: dict[type, str] = {
    DataLoader: "; of a DataLoader: x, y = (torch.cat(parts) for parts in zip(*loader))",
    Dataset: "; of a Dataset: dataset.test",
}


def as_images(images: Any) -> Images:
    """Take images with labels as `Images`, or as a pair (x, y): floats (N, C, H, W), or uint8, and labels (N,).

    The two of a pair may be tensors or NumPy arrays. Half precision becomes float32, and tensors that were made in
    `torch.inference_mode()` are copied, so that gradients can be taken where the caller is outside of it.

    Raises:
        UserError: anything else, or no image.
    """
    if isinstance(images, tuple | list) and len(images) == 2 and all(map(_is_array, images)):
        images = _paired(*(part if isinstance(part, Tensor) else _to_tensor(part) for part in images))
    if not isinstance(images, Images):
        hint = next((hint for kind, hint in HINTS.items() if isinstance(images, kind)), "")
        raise UserError(
            "images must be advalign.data.Images, or a pair (x, y) of tensors, floats (N, C, H, W) in [0, 1] and "
            f"labels (N,), not {type(images).__name__}{hint}"
        )
    require(len(images) > 0, "there are no images")
    if isinstance(images, StoredImages):
        return images
    pixels, labels = images.pixels, images.labels
    if pixels.dtype in (torch.float16, torch.bfloat16):
        pixels = pixels.float()
    pixels, labels = (part.clone() if part.is_inference() else part for part in (pixels, labels))
    return images if pixels is images.pixels and labels is images.labels else Images(pixels, labels)


def _to_tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))  # a copy: torch takes no negative strides


def _is_array(part: object) -> bool:
    return isinstance(part, Tensor) or (isinstance(part, np.ndarray) and part.dtype.kind in "biufc")


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
