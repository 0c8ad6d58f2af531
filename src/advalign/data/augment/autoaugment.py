"""AutoAugment's policy for CIFAR-10, Cubuk et al. 2019, with the magnitudes of the port by DeepVoltaire."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Num, UInt8
from torch import Tensor

from advalign.data.augment import color
from advalign.data.augment.geometry import Uniforms, affine, bicubic_shear_x, levels, rotate

FILL = 128
"""Gray from outside the image."""

# Two steps: the probability, the operation, and its magnitude from 0 to 9.
POLICY = (
    ((0.1, "invert", 7), (0.2, "contrast", 6)),
    ((0.7, "rotate", 2), (0.3, "translate x", 9)),
    ((0.8, "sharpness", 1), (0.9, "sharpness", 3)),
    ((0.5, "shear y", 8), (0.7, "translate y", 9)),
    ((0.5, "autocontrast", 8), (0.9, "equalize", 2)),
    ((0.2, "shear y", 7), (0.3, "posterize", 7)),
    ((0.4, "saturation", 3), (0.6, "brightness", 7)),
    ((0.3, "sharpness", 9), (0.7, "brightness", 9)),
    ((0.6, "equalize", 5), (0.5, "equalize", 1)),
    ((0.6, "contrast", 7), (0.6, "sharpness", 5)),
    ((0.7, "saturation", 7), (0.5, "translate x", 8)),
    ((0.3, "equalize", 7), (0.4, "autocontrast", 8)),
    ((0.4, "translate y", 3), (0.2, "sharpness", 6)),
    ((0.9, "brightness", 6), (0.2, "saturation", 8)),
    ((0.5, "solarize", 2), (0.0, "invert", 3)),
    ((0.2, "equalize", 0), (0.6, "autocontrast", 0)),
    ((0.2, "equalize", 8), (0.6, "equalize", 4)),
    ((0.9, "saturation", 9), (0.6, "equalize", 6)),
    ((0.8, "autocontrast", 4), (0.2, "solarize", 8)),
    ((0.1, "brightness", 3), (0.7, "saturation", 0)),
    ((0.4, "solarize", 5), (0.9, "autocontrast", 3)),
    ((0.9, "translate y", 9), (0.7, "translate y", 9)),
    ((0.9, "autocontrast", 2), (0.8, "solarize", 3)),
    ((0.8, "equalize", 8), (0.1, "invert", 3)),
    ((0.7, "translate y", 9), (0.9, "autocontrast", 1)),
)


def _moved_x(pixels: Tensor, share: Tensor) -> Tensor:
    """Shift each image by a share of its width."""
    one, zero = torch.ones_like(share), torch.zeros_like(share)
    return affine(pixels, torch.stack([one, zero, share * pixels.shape[3], zero, one, zero], 1), FILL)


# Of pixels, a magnitude m from 0 to 1 and a sign s for each image.
OPERATIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "shear y": lambda pixels, m, s: bicubic_shear_x(pixels.mT, s * 0.3 * m, FILL).mT,
    "translate x": lambda pixels, m, s: _moved_x(pixels, s * 150 / 331 * m),
    "translate y": lambda pixels, m, s: _moved_x(pixels.mT, s * 150 / 331 * m).mT,
    "rotate": lambda pixels, m, s: rotate(pixels, 30 * m, FILL),
    "saturation": lambda pixels, m, s: color.saturation(pixels, 1 + s * 0.9 * m),
    "brightness": lambda pixels, m, s: color.brightness(pixels, 1 + s * 0.9 * m),
    "contrast": lambda pixels, m, s: color.contrast(pixels, 1 + s * 0.9 * m),
    "sharpness": lambda pixels, m, s: color.sharpness(pixels, 1 + s * 0.9 * m),
    "posterize": lambda pixels, m, s: color.posterize(pixels, (8 - 4 * m).round()),
    "solarize": lambda pixels, m, s: color.solarize(pixels, 256 - 256 * m),
    "autocontrast": lambda pixels, m, s: color.autocontrast(pixels),
    "equalize": lambda pixels, m, s: color.equalize(pixels),
    "invert": lambda pixels, m, s: color.invert(pixels),
}


def autoaugment(pixels: Num[Tensor, "N C H W"], u: Uniforms) -> UInt8[Tensor, "N C H W"]:
    """Do to each image the two steps of one of the 25 sub-policies, all alike likely. Reads 5 of the uniforms."""
    result = levels(pixels).clone()
    chosen = (u[:, 0] * len(POLICY)).long()
    for step, draws in enumerate((u[:, 1:3], u[:, 3:5])):
        probability = torch.tensor([each[step][0] for each in POLICY], dtype=torch.float64)[chosen]
        magnitude = torch.tensor([each[step][2] / 9 for each in POLICY], dtype=torch.float64)[chosen]
        applied, sign = draws[:, 0] < probability, 1 - 2 * (draws[:, 1] < 0.5).double()
        for name, operation in OPERATIONS.items():
            has = torch.tensor([each[step][1] == name for each in POLICY])[chosen]
            rows = (applied & has).nonzero()[:, 0]
            if len(rows):
                there = rows.to(pixels.device)
                result[there] = operation(result[there], magnitude[rows], sign[rows])
    return result
