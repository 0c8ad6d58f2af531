"""Pillow's colour operations on batches of uint8 images (N, C, H, W) of 1 or 3 channels, in its own arithmetic."""

from __future__ import annotations

import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

Pixels = UInt8[Tensor, "N C H W"]
PerImage = Float64[Tensor, "N"]
"""A strength for each image, on the CPU."""

GRAY = (19595, 38470, 7471)
"""Weights of red, green and blue in 1/65536."""


def saturation(pixels: Pixels, factor: PerImage) -> Pixels:
    """Blend each image with its gray one, as `ImageEnhance.Color`."""
    return _blend(_gray(pixels).expand_as(pixels), pixels, factor)


def brightness(pixels: Pixels, factor: PerImage) -> Pixels:
    """Blend each image with a black one, as `ImageEnhance.Brightness`."""
    return _blend(torch.zeros_like(pixels), pixels, factor)


def contrast(pixels: Pixels, factor: PerImage) -> Pixels:
    """Blend each image with its mean gray, rounded, as `ImageEnhance.Contrast`."""
    gray = _gray(pixels).flatten(1)
    mean = (2 * gray.sum(1, dtype=torch.int64) + gray.shape[1]) // (2 * gray.shape[1])
    return _blend(mean.to(torch.uint8)[:, None, None, None].expand_as(pixels), pixels, factor)


def sharpness(pixels: Pixels, factor: PerImage) -> Pixels:
    """Blend each image with a smooth one, whose border is the image's own, as `ImageEnhance.Sharpness`."""
    height, width = pixels.shape[2:]
    smooth = pixels.clone()
    if min(height, width) > 2:  # a smaller image is all border
        wide = pixels.int()
        shifted = [wide[:, :, y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3)]
        total = torch.stack(shifted).sum(0) + 4 * shifted[4]
        smooth[:, :, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return _blend(smooth, pixels, factor)


def autocontrast(pixels: Pixels) -> Pixels:
    """Stretch each channel to 0 ... 255, as `ImageOps.autocontrast`, which may give one level less by its rounding."""
    low, high = pixels.amin((2, 3), keepdim=True).int(), pixels.amax((2, 3), keepdim=True).int()
    stretched = (pixels.int() - low) * 255 // (high - low).clamp(min=1)
    return torch.where(high > low, stretched.to(torch.uint8), pixels)


def equalize(pixels: Pixels) -> Pixels:
    """Flatten the histogram of each channel, as `ImageOps.equalize`."""
    values = pixels.flatten(2).long()
    counts = values.new_zeros(*values.shape[:2], 256).scatter_add_(2, values, torch.ones_like(values))
    brightest = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    darker = counts.cumsum(2) - counts
    table = ((step // 2 + darker) // step.clamp(min=1)).clamp(max=255)
    flat = torch.where(step > 0, table.gather(2, values), values)
    return flat.to(torch.uint8).view(pixels.shape)


def invert(pixels: Pixels) -> Pixels:
    """Return the negative of each image."""
    return 255 - pixels


def posterize(pixels: Pixels, bits: PerImage) -> Pixels:
    """Keep the highest bits of each value, as `ImageOps.posterize`."""
    lost = (8 - bits).int().to(pixels.device)[:, None, None, None]
    return (pixels.int() >> lost << lost).to(torch.uint8)


def solarize(pixels: Pixels, threshold: PerImage) -> Pixels:
    """Invert the values from the threshold on, as `ImageOps.solarize`."""
    first = threshold.ceil().int().to(pixels.device)[:, None, None, None]
    return torch.where(pixels < first, pixels, 255 - pixels)


def _gray(pixels: Pixels) -> UInt8[Tensor, "N 1 H W"]:
    """Return the luma of each image, as `Image.convert("L")`."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = (weight * channel for weight, channel in zip(GRAY, pixels.int().split(1, 1), strict=True))
    return (red + green + blue + (1 << 15) >> 16).to(torch.uint8)


def _blend(plain: Pixels, pixels: Pixels, factor: PerImage) -> Pixels:
    """Return plain + factor (pixels - plain) in float32, cut to 0 ... 255 and truncated, as `Image.blend`."""
    share = factor.float().to(pixels.device)[:, None, None, None]
    start = plain.float()
    return ((pixels.float() - start) * share).add_(start).clamp_(0, 255).to(torch.uint8)
