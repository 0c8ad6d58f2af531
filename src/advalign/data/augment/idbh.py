"""IDBH: diverse but balanced augmentation for adversarial training, Li and Spratling, ICLR 2023, for CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Num, UInt8
from torch import Tensor

from advalign.data.augment import color
from advalign.data.augment.geometry import Uniforms, crop_shift, erase, levels, rotate, shear_x, shear_y

Operation = Callable[[Tensor, Tensor], Tensor]


def _sign(u: Uniforms) -> Tensor:
    return 1 - 2 * (u[:, 1] < 0.5).double()


def _sheared(pixels: Tensor, u: Uniforms) -> Tensor:
    """Shear along x or y by 0.05 to 0.15 radians."""
    radians = _sign(u) * (0.05 + 0.1 * u[:, 0])
    along_x = (u[:, 2] < 0.5).to(pixels.device)[:, None, None, None]
    return shear_x(pixels, radians).where(along_x, shear_y(pixels, radians))


# Each image undergoes one of these, all alike likely, with a strength made of a uniform number and a random sign.
OPERATIONS: dict[str, Operation] = {
    "saturation": lambda pixels, u: color.saturation(pixels, 0.1 + 1.8 * u[:, 0]),
    "brightness": lambda pixels, u: color.brightness(pixels, 0.5 + 1.4 * u[:, 0]),
    "contrast": lambda pixels, u: color.contrast(pixels, 0.5 + 1.4 * u[:, 0]),
    "sharpness": lambda pixels, u: color.sharpness(pixels, 0.1 + 1.8 * u[:, 0]),
    "autocontrast": lambda pixels, u: color.autocontrast(pixels),
    "equalize": lambda pixels, u: color.equalize(pixels),
    "shear": _sheared,
    "rotate": lambda pixels, u: rotate(pixels, _sign(u) * (1 + (10 * u[:, 0]).floor()), fill=0),
}
DRAWS = 33
"""Uniforms that `idbh` reads for each image: 6 for CropShift, 4 for the operation, 23 for the box to erase."""


def idbh(pixels: Num[Tensor, "N C H W"], u: Uniforms, erased: float) -> UInt8[Tensor, "N C H W"]:
    """Crop and shift, change colour or shape once, and erase a box with probability `erased`."""
    changed = one_of(list(OPERATIONS.values()), crop_shift(levels(pixels), u), u[:, 6:10])
    return erase(changed, u[:, 10:], p=erased)


def one_of(operations: list[Operation], pixels: Tensor, u: Uniforms) -> Tensor:
    """Apply to each image one operation, chosen by its first uniform; the others are the operation's own."""
    chosen = (u[:, 0] * len(operations)).long()
    result = pixels.clone()
    for number, operation in enumerate(operations):
        rows = (chosen == number).nonzero()[:, 0]  # on the CPU, so that no GPU waits
        if len(rows):
            there = rows.to(pixels.device)
            result[there] = operation(pixels[there], u[rows, 1:])
    return result
