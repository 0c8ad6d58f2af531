"""A user's arrays as images and labels; of those that are refused, what to write instead."""

from __future__ import annotations

import numpy as np

from advalign.errors import UserError, require

ROUNDING = 1e-6
"""How far floats may lie outside [0, 1]: sums and products of single precision do."""


def to_pixels(x: np.ndarray, source: str) -> np.ndarray:
    """Return the images (N, C, H, W), as uint8 if that holds them without loss, else as float32.

    Raises:
        UserError: another shape, type or range, with what to write instead.
    """
    shape = x.shape
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and shape[-1] in (1, 3):
        x = np.moveaxis(x, -1, 1)
    require(
        x.ndim == 4 and x.shape[1] in (1, 3) and x.size > 0,
        lambda: (
            f"{source} has shape {shape}; images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3"
            f"{_hint_on_shape(shape)}"
        ),
    )
    if x.dtype.kind == "f":
        low, high = x.min(), x.max()  # a NaN anywhere makes both NaN, and the comparison false
        require(
            bool(low >= -ROUNDING and high <= 1 + ROUNDING),
            lambda: f"{source} has floats from {low:g} to {high:g}; they must lie in [0, 1]{_hint_on_pixels(x)}",
        )
        x = _as_uint8_or_float32(x)
    else:
        require(
            x.dtype == np.uint8,
            lambda: f"{source} has {x.dtype} values; images are uint8, or floats in [0, 1]{_hint_on_pixels(x)}",
        )
    return np.ascontiguousarray(x)


def _as_uint8_or_float32(x: np.ndarray) -> np.ndarray:
    """Return floats as uint8 where each is a multiple of 1/255, as far as its type can tell; else as float32."""
    single = x.astype(np.float32).clip(0, 1)
    levels = np.rint(single * 255)
    precision = np.float16 if x.dtype.itemsize < 4 else np.float32
    whole = np.array_equal((levels / np.float32(255)).astype(precision), single.astype(precision))
    return levels.astype(np.uint8) if whole else single


def to_labels(y: np.ndarray, source: str) -> np.ndarray:
    """Return the labels as int64 (N,).

    Raises:
        UserError: another shape or type, with what to write instead, or a label below 0.
    """
    require(
        y.ndim == 1,
        lambda: f"{source} has shape {y.shape}; labels are (N,), one integer for each image{_hint_on_labels(y)}",
    )
    require(
        y.dtype.kind in "iu", lambda: f"{source} has {y.dtype} values; labels are integers from 0{_hint_on_labels(y)}"
    )
    labels = y.astype(np.int64)
    outside = y[labels < 0]  # also of uint64, beyond what int64 holds
    if len(outside):
        raise UserError(f"{source} has the label {outside[0]}; labels are integers from 0")
    return labels


def hint_on_classes(present: np.ndarray) -> str:
    """Return how to count classes from 0 and without gaps, given the labels that are there, ascending."""
    lowest = int(present[0])
    if np.array_equal(present, np.arange(lowest, lowest + len(present))):
        return f"; they count from {lowest}: save y - {lowest}"
    return "; np.unique(y, return_inverse=True)[1] counts them so"


def _hint_on_pixels(x: np.ndarray) -> str:
    """Return how to make images of values of another type or range; nothing where that cannot be told."""
    if x.dtype == bool:
        return ": save x.astype(np.uint8) * 255"
    if x.dtype.kind in "iu" and x.size and x.min() >= 0 and x.max() <= 255:
        return ": save x.astype(np.uint8)"
    if x.dtype == np.uint16:
        return ": save x / 65535, or by what else their highest value can be"
    if x.dtype.kind != "f" or not np.isfinite(x).all():
        return ""
    if x.min() >= 0:
        return ": save x / 255" if 1.1 < x.max() <= 255 else ""
    if x.min() >= -1 and x.max() <= 1:
        return ": save (x + 1) / 2 if -1 is black, or undo what normalised them"
    return ": undo what normalised them, as a normalisation belongs inside the network"


def _hint_on_shape(shape: tuple[int, ...]) -> str:
    """Return what to do about images with a fourth channel; nothing about other shapes."""
    if len(shape) == 4 and 4 in (shape[1], shape[-1]):
        return f"; of four channels, the fourth may be alpha: save x[{':, :3' if shape[1] == 4 else '..., :3'}]"
    return ""


def _hint_on_labels(y: np.ndarray) -> str:
    """Return how to make labels (N,), integers from 0, of those of another kind; nothing where that cannot be told."""
    if y.ndim == 2 and y.shape[1] == 1:
        return ": save y[:, 0]"
    if y.ndim == 2 and y.dtype.kind in "biuf" and ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all():
        return ": save y.argmax(1), as they are one-hot"
    if y.ndim == 1 and y.dtype.kind in "US":
        return ": save class_names, y_train = np.unique(y, return_inverse=True)"
    if y.ndim == 1 and (y.dtype == bool or (y.dtype.kind == "f" and (y == np.rint(y)).all())):
        return ": save y.astype(int)"
    return ""
