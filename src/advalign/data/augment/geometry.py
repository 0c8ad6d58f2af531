"""What moves or hides pixels. Positions are integers, so that any device gives the same bits."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64, Int, Num, UInt8
from torch import Tensor
from torch.nn import functional as F

from advalign.shapes import Mask

Pixels = Num[Tensor, "N C H W"]
Uniforms = Float64[Tensor, "N K"]
"""Numbers in [0, 1) on the CPU, from which the choices for each image are made."""

Angles = Float64[Tensor, "N"]
"""An angle for each image, on the CPU."""
Integers = Int[Tensor, "N"]

FIXED = 16
"""Bits behind the point in Pillow's affine maps."""
WEIGHT = 22
"""Bits behind the point in Pillow's resizing weights."""
TRIES = 10
"""Boxes that torchvision draws at most before it gives up."""


def flip_and_crop(pixels: Pixels, flipped: Mask, corners: Int[Tensor, "N 2"], pad: int) -> Pixels:
    """Crop each image at its corner of the zero-padded frame, mirror it if flipped: one gather, no loop, no sync."""
    down, across = crop_positions(flipped, corners, *pixels.shape[2:])
    return _taken(F.pad(pixels, (pad, pad, pad, pad)), down[:, :, None], across[:, None, :])


def crop_positions(flipped: Mask, corners: Int[Tensor, "N 2"], height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the rows (N, H) and columns (N, W) of the padded frame that each crop takes, mirrored if flipped."""
    down = corners[:, :1] + torch.arange(height, device=corners.device)
    across = corners[:, 1:] + torch.arange(width, device=corners.device)
    return down, torch.where(flipped[:, None], across.flip(1), across)


def crop_shift(pixels: Pixels, u: Uniforms) -> Pixels:
    """Keep a window that lacks cx columns and cy rows, cx + cy = 0 ... 10, and paste it elsewhere on black.

    Li and Spratling 2023. Reads 6 of the uniforms.
    """
    strength = _whole(u[:, 0], 11)
    cut_x = _whole(u[:, 1], strength + 1)
    cut_y = strength - cut_x
    left, to_left = _whole(u[:, 2], cut_x + 1), _whole(u[:, 3], cut_x + 1)
    top, to_top = _whole(u[:, 4], cut_y + 1), _whole(u[:, 5], cut_y + 1)
    device, (height, width) = pixels.device, pixels.shape[2:]
    cut_x, cut_y, left, to_left, top, to_top = (
        each.to(device)[:, None] for each in (cut_x, cut_y, left, to_left, top, to_top)
    )
    row, column = torch.arange(height, device=device), torch.arange(width, device=device)
    row_kept = (row >= to_top) & (row < to_top + height - cut_y)
    column_kept = (column >= to_left) & (column < to_left + width - cut_x)
    down, across = row - to_top + top, column - to_left + left
    kept = row_kept[:, :, None] & column_kept[:, None, :]
    return _taken(pixels, down[:, :, None], across[:, None, :], kept, fill=0)


def erase(pixels: Pixels, u: Uniforms, p: float) -> Pixels:
    """Blacken a box with probability p: 2 to 33 % of the area, its sides in a ratio from 0.3 to 3.3.

    Zhong et al. 2020 with torchvision's settings. Reads 3 + 2 * TRIES of the uniforms.
    """
    height, width = pixels.shape[2:]
    sides = _box(u[:, 3:], (height, width), (height - 1, width - 1), area=(0.02, 0.33), ratio=(0.3, 3.3))
    down, across = sides.unbind(1)
    hidden = u[:, 0] < p
    top, left = _whole(u[:, 1], height - down + 1), _whole(u[:, 2], width - across + 1)
    top, left, down, across, hidden = (
        each.to(pixels.device)[:, None, None] for each in (top, left, down, across, hidden)
    )
    row = torch.arange(height, device=pixels.device)[:, None]
    column = torch.arange(width, device=pixels.device)
    inside = (row >= top) & (row < top + down) & (column >= left) & (column < left + across)
    return pixels.masked_fill((inside & hidden)[:, None], 0)


def resized_crop(pixels: UInt8[Tensor, "N C H W"], u: Uniforms) -> UInt8[Tensor, "N C H W"]:
    """Enlarge a box of 8 to 100 % of the area, sides in a ratio from 3/4 to 4/3, to the image, bilinearly as Pillow.

    Szegedy et al. 2015 with torchvision's settings. Reads 2 + 2 * TRIES of the uniforms.
    """
    height, width = pixels.shape[2:]
    ratio = (3 / 4, 4 / 3)
    sides = _box(u[:, 2:], (height, width), (height, width), area=(0.08, 1), ratio=ratio)
    found = sides[:, 0] > 0
    # Where no try fits: the central box that comes nearest to the allowed ratios.
    widest = min(width, round(height * ratio[1]))
    tallest = min(height, round(width / ratio[0]))
    down, across = torch.where(found[:, None], sides, torch.tensor([tallest, widest])).unbind(1)
    top = torch.where(found, _whole(u[:, 0], height - down + 1), (height - down) // 2)
    left = torch.where(found, _whole(u[:, 1], width - across + 1), (width - across) // 2)
    enlarged = _enlarged(pixels.mT, left, across).mT
    return _enlarged(enlarged, top, down)


def _enlarged(pixels: UInt8[Tensor, "N C H W"], first: Integers, count: Integers) -> Tensor:
    """Stretch each image's rows first ... first + count - 1 over its height, in Pillow's integer arithmetic."""
    height, device = pixels.shape[2], pixels.device
    count = count[:, None].double()
    at = (torch.arange(height) + 0.5) * (count / height) - 0.5
    at = at.clamp(min=0).minimum(count - 1)
    above = at.floor()
    below = (above + 1).minimum(count - 1)
    share = at - above
    weights = (torch.stack([1 - share, share]) * (1 << WEIGHT) + 0.5).int().to(device)[:, :, None, :, None]
    column = torch.arange(pixels.shape[3], device=device)
    rows = [(each.long() + first[:, None]).to(device)[:, :, None] for each in (above, below)]
    upper, lower = (_taken(pixels, row, column).int() for row in rows)
    return (weights[0] * upper + weights[1] * lower + (1 << WEIGHT - 1) >> WEIGHT).to(torch.uint8)


def affine(pixels: Pixels, matrix: Float64[Tensor, "N 6"], fill: int) -> Pixels:
    """Take the nearest pixel at (a x + b y + c, d x + e y + f), as `Image.transform` does; `fill` where there is none.

    Args:
        pixels: the images.
        matrix: (N, 6), on the CPU: a, b, c, d, e, f.
        fill: value from outside the image.
    """
    height, width = pixels.shape[2:]
    a, b, c, d, e, f = matrix.unbind(1)
    numbers = torch.stack([a, b, c + a * 0.5 + b * 0.5, d, e, f + d * 0.5 + e * 0.5], 1)
    fixed = (numbers * (1 << FIXED) + 0.5).floor().long().to(pixels.device)
    a, b, c, d, e, f = fixed[:, :, None, None].unbind(1)
    row = torch.arange(height, device=pixels.device)[:, None]
    column = torch.arange(width, device=pixels.device)
    across, down = a * column + b * row + c >> FIXED, d * column + e * row + f >> FIXED
    inside = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    return _taken(pixels, down, across, inside, fill)


def rotate(pixels: Pixels, degrees: Angles, fill: int) -> Pixels:
    """Rotate each image counter-clockwise about its centre, to the nearest pixel."""
    height, width = pixels.shape[2:]
    angle = -torch.deg2rad(degrees)
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2
    return affine(pixels, torch.stack([cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y], 1), fill)


def shear_x(pixels: Pixels, radians: Angles) -> Pixels:
    """Shift the rows of each image against each other about its centre, to the nearest pixel."""
    slope, one, zero = radians.tan(), torch.ones_like(radians), torch.zeros_like(radians)
    return affine(pixels, torch.stack([one, slope, -slope * (pixels.shape[2] / 2), zero, one, zero], 1), fill=0)


def shear_y(pixels: Pixels, radians: Angles) -> Pixels:
    """Shift the columns of each image against each other about its centre, to the nearest pixel."""
    return shear_x(pixels.mT, radians).mT


def bicubic_shear_x(pixels: UInt8[Tensor, "N C H W"], slope: Angles, fill: int) -> UInt8[Tensor, "N C H W"]:
    """Move each row by slope times its height from the upper edge, in cubic interpolation as `Image.transform`."""
    height, width = pixels.shape[2:]
    shift = slope[:, None] * (torch.arange(height) + 0.5)
    first = shift.floor()
    d = (shift - first).float().to(pixels.device)[:, None, :, None]
    column, row = torch.arange(width), torch.arange(height, device=pixels.device)[:, None]
    at = column + 0.5 + shift[:, :, None]
    inside = ((at >= 0) & (at < width)).to(pixels.device)
    across = (column + first[:, :, None]).long().to(pixels.device)
    u, v, w, x = (_taken(pixels, row, (across + k).clamp(0, width - 1)).float() for k in (-1, 0, 1, 2))
    cubic = v + d * (w - u + d * (2 * (u - v) + w - x + d * (v - u + x - w)))
    return cubic.clamp(0, 255).to(torch.uint8).masked_fill(~inside[:, None], fill)


def levels(pixels: Pixels) -> UInt8[Tensor, "N C H W"]:
    """Return the images in 256 levels: uint8 as they are, floats in [0, 1] rounded."""
    return (pixels * 255).round().clamp(0, 255).to(torch.uint8) if pixels.is_floating_point() else pixels


def _whole(u: Tensor, count: int | Tensor) -> Integers:
    """Turn numbers in [0, 1) into integers from 0 to count - 1, all alike likely."""
    return (u * count).long()


def _box(
    u: Tensor, size: tuple[int, int], most: tuple[int, int], *, area: tuple[float, float], ratio: tuple[float, float]
) -> Int[Tensor, "N 2"]:
    """Return the height and width of the first of the boxes drawn that fits, (0, 0) if none of `TRIES` does."""
    areas = size[0] * size[1] * (area[0] + (area[1] - area[0]) * u[:, :TRIES])
    low, high = torch.tensor(ratio, dtype=torch.float64).log()
    ratios = (low + (high - low) * u[:, TRIES : 2 * TRIES]).exp()
    sides = torch.stack([(areas * ratios).sqrt(), (areas / ratios).sqrt()], 2).round().long()
    fits = ((sides > 0) & (sides <= torch.tensor(most))).all(2)
    first = fits.int().argmax(1)
    return sides[torch.arange(len(u)), first] * fits.any(1)[:, None]


def _taken(
    pixels: Num[Tensor, "N C _ _"],
    down: Tensor,
    across: Tensor,
    kept: Bool[Tensor, "N H W"] | None = None,
    fill: int = 0,
) -> Pixels:
    """Return the pixels at (down, across), integers that broadcast to (N, H, W); `fill` where they are not kept."""
    if kept is not None:
        down, across = down.clamp(0, pixels.shape[2] - 1), across.clamp(0, pixels.shape[3] - 1)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # Indices on both sides of a slice put the channels last: (N, H, W, C) is the memory format that is wanted.
    taken = pixels[image, :, down, across].permute(0, 3, 1, 2)
    return taken if kept is None else taken.masked_fill(~kept[:, None], fill)
