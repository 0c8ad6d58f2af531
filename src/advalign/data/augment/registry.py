"""The augmentations by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from advalign.data.augment.autoaugment import autoaugment
from advalign.data.augment.geometry import TRIES, crop_shift, erase, levels, resized_crop
from advalign.data.augment.idbh import DRAWS, idbh
from advalign.errors import require

PAD = 4
"""Border of the random crop, as in all CIFAR recipes since He et al. 2016."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to each image of a batch: flip, crop, and then what the method adds, or this first."""

    summary: str
    """what it does, in a line"""
    flip: bool = True
    """whether images are mirrored with probability one half"""
    pad: int = 0
    """black border of the random crop"""
    draws: int = 0
    """uniform numbers that `then` reads for each image"""
    then: Callable[[Tensor, Tensor], Tensor] | None = None
    """turns pixels (N, C, H, W) and uniforms (N, draws) into pixels; each image depends on its own row alone"""
    then_first: bool = False
    """whether `then` comes before flip and crop"""
    min_side: int = 1
    """smallest height and width it can work on"""
    changes_colors: bool = False
    """whether it needs images of 1 or 3 channels"""

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Check that it can work on images of a shape (C, H, W).

        Raises:
            UserError: they are too small, or have other channels than 1 or 3.
        """
        channels, height, width = shape
        require(
            min(height, width) >= self.min_side,
            lambda: (
                f"augment={name} needs images of at least {self.min_side} x {self.min_side} pixels, and these have "
                f"{height} x {width}: choose flip-crop"
            ),
        )
        require(
            not self.changes_colors or channels in (1, 3),
            lambda: f"augment={name} needs images of 1 or 3 channels, and these have {channels}: choose flip-crop",
        )


def _idbh(images: str, share: float) -> Augmentation:
    return Augmentation(
        summary=f"cropshift, one change of colour or shape, a box erased in {images}",
        draws=DRAWS,
        then=lambda pixels, u: idbh(pixels, u, erased=share),
        min_side=11,
        changes_colors=True,
    )


AUGMENTATIONS = {
    "none": Augmentation(summary="images as they are", flip=False),
    "flip": Augmentation(summary="mirrored left to right with probability one half"),
    "flip-crop": Augmentation(
        summary="mirrored, and shifted by up to 4 pixels each way over a black border", pad=PAD
    ),
    "cropshift": Augmentation(
        summary="mirrored; a window that lacks up to 10 rows and columns is pasted elsewhere on black",
        draws=6,
        then=crop_shift,
        min_side=11,
    ),
    "random-erasing": Augmentation(
        summary="flip-crop; every other image loses a box to black",
        pad=PAD,
        draws=3 + 2 * TRIES,
        then=lambda pixels, u: erase(pixels, u, p=0.5),
    ),
    "idbh-weak": _idbh("every other image", 0.5),
    "idbh-strong": _idbh("each image", 1.0),
    "autoaugment": Augmentation(
        summary="flip-crop, then two operations of AutoAugment's policy for CIFAR-10",
        pad=PAD,
        draws=5,
        then=autoaugment,
        changes_colors=True,
    ),
    "autoaugment-first": Augmentation(
        summary="two operations of AutoAugment's policy for CIFAR-10, then flip-crop",
        pad=PAD,
        draws=5,
        then=autoaugment,
        then_first=True,
        changes_colors=True,
    ),
    "resized-crop": Augmentation(
        summary="mirrored; a box of 8 to 100 % of the area is enlarged to the image",
        draws=2 + 2 * TRIES,
        then=lambda pixels, u: resized_crop(levels(pixels), u),
    ),
}  # fmt: skip
