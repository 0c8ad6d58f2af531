"""Common corruptions of 32 x 32 colour images, made here: like those of CIFAR-10-C, and never called so.

With the constants of Hendrycks and Dietterich 2019 for CIFAR. Contrast, brightness, defocus, zoom, pixelate and JPEG
draw nothing, so the published files can differ by rounding and by the version of a library alone; noise, fog and glass
are the same in distribution. Not made: motion blur and snow, which need ImageMagick's blur; frost, which needs its six
photographs; and elastic transform, whose warp is OpenCV's.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import PIL
import scipy
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, features
from scipy import ndimage

Picture = NDArray[np.float64]
"""(32, 32, 3) in [0, 1]."""
SIDE = 32
LIBRARIES = {
    "numpy": np.__version__,
    "pillow": PIL.__version__,
    "jpeg": features.version("libjpeg_turbo") or features.version("jpg") or "",
    "scipy": scipy.__version__,
}
"""Versions of what makes the images, on which their pixels depend."""


def corrupt(image: NDArray[np.uint8], kind: str, severity: int, *, seed: int) -> NDArray[np.uint8]:
    """Return an image (32, 32, 3) with a corruption of one of five severities; truncated to 8 bits, as the authors do.

    Args:
        kind: one of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of what is drawn, together with kind and severity.
    """
    rng = np.random.default_rng([list(CORRUPTIONS).index(kind), severity, seed])
    return (CORRUPTIONS[kind](image / 255.0, severity - 1, rng).clip(0, 1) * 255).astype(np.uint8)


def _gaussian_noise(x: Picture, level: int, rng: Generator) -> Picture:
    return x + rng.normal(0, (0.04, 0.06, 0.08, 0.09, 0.10)[level], x.shape)


def _shot_noise(x: Picture, level: int, rng: Generator) -> Picture:
    photons = (500, 250, 100, 75, 50)[level]
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: Picture, level: int, rng: Generator) -> Picture:
    hit = rng.random(x.shape) <= (0.01, 0.02, 0.03, 0.05, 0.07)[level]
    return np.where(hit, rng.random(x.shape) <= 0.5, x)


def _defocus_blur(x: Picture, level: int, rng: Generator) -> Picture:
    radius, alias = ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))[level]
    across = np.arange(-8, 9)
    disk = (across**2 + across[:, None] ** 2 <= radius**2).astype(float)
    smooth = np.exp(-(np.array([-1, 0, 1]) ** 2) / (2 * alias**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, smooth / smooth.sum(), axis, mode="mirror")
    return ndimage.correlate(x, (disk / disk.sum())[..., None], mode="mirror")


def _glass_blur(x: Picture, level: int, rng: Generator) -> Picture:
    sigma, rounds = ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))[level]
    x = np.floor(_smooth(x, sigma) * 255)
    for _ in range(rounds):
        moves = rng.integers(-1, 1, (SIDE, SIDE, 2))
        for row in range(SIDE - 1, 1, -1):
            for column in range(SIDE - 1, 1, -1):
                right, down = moves[row, column]
                x[row, column] = x[row + down, column + right]  # copied, not exchanged, in the authors' code too
    return _smooth(x / 255, sigma)


def _smooth(x: Picture, sigma: float) -> Picture:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")


def _zoom_blur(x: Picture, level: int, rng: Generator) -> Picture:
    factors = np.arange(1, (1.06, 1.11, 1.16, 1.21, 1.26)[level], 0.01)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: Picture, factor: float) -> Picture:
    """Return the middle of the image, enlarged to the whole."""
    inner = int(np.ceil(SIDE / factor))
    first = (SIDE - inner) // 2
    middle = x[first : first + inner, first : first + inner]
    larger = np.asarray(ndimage.zoom(middle, (factor, factor, 1), order=1))
    first = (len(larger) - SIDE) // 2
    return larger[first : first + SIDE, first : first + SIDE]


def _fog(x: Picture, level: int, rng: Generator) -> Picture:
    strength, decay = ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))[level]
    brightest = x.max()
    return (x + strength * _plasma(decay, rng)[..., None]) * brightest / (brightest + strength)


def _plasma(decay: float, rng: Generator) -> NDArray[np.float64]:
    """Return a height map (32, 32) from 0 to 1 by the diamond-square algorithm on a torus."""
    heights, step, wild = np.zeros((SIDE, SIDE)), SIDE, 100.0

    def mean(corners: NDArray[np.float64]) -> NDArray[np.float64]:
        return corners / 4 + wild * rng.uniform(-wild, wild, corners.shape)

    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]
        rows = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = mean(rows + np.roll(rows, -1, 1))
        middles = heights[half::step, half::step]
        heights[::step, half::step] = mean(
            middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        )  # fmt: skip
        heights[half::step, ::step] = mean(
            middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        )  # fmt: skip
        step, wild = half, wild / decay
    heights -= heights.min()
    return heights / heights.max()


def _brightness(x: Picture, level: int, rng: Generator) -> Picture:
    """Raise the value of HSV: hue and saturation stay, so all channels grow by the same factor; black becomes grey."""
    value = x.max(2, keepdims=True)
    brighter = np.minimum(value + (0.05, 0.1, 0.15, 0.2, 0.3)[level], 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)


def _contrast(x: Picture, level: int, rng: Generator) -> Picture:
    mean = x.mean((0, 1), keepdims=True)
    return (x - mean) * (0.75, 0.5, 0.4, 0.3, 0.15)[level] + mean


def _pixelate(x: Picture, level: int, rng: Generator) -> Picture:
    side = int(SIDE * (0.95, 0.9, 0.85, 0.75, 0.65)[level])
    box = Image.Resampling.BOX
    return np.asarray(_picture(x).resize((side, side), box).resize((SIDE, SIDE), box)) / 255


def _jpeg_compression(x: Picture, level: int, rng: Generator) -> Picture:
    file = io.BytesIO()
    _picture(x).save(file, "JPEG", quality=(80, 65, 58, 50, 40)[level])
    return np.asarray(Image.open(file)) / 255


def _picture(x: Picture) -> Image.Image:
    return Image.fromarray(np.rint(x * 255).astype(np.uint8))


CORRUPTIONS: dict[str, Callable[[Picture, int, Generator], Picture]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "zoom_blur": _zoom_blur,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}
"""By the name that the published files have."""
