"""A user's own arrays in an `.npz` file."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from advalign.data.images import Dataset, Images, note_on_test, split_for_test
from advalign.data.npy import read_array, read_header
from advalign.errors import UserError, require

TRAIN, TEST = ("x_train", "y_train"), ("x_test", "y_test")


def load_npz(path: Path | str) -> Dataset:
    """Return the data set in an `.npz` file; without test arrays, a fixed fifth of the images is held out.

    Images, `x_train` and `x_test`, are uint8 or floats in [0, 1], of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with
    C 1 or 3; floats are rounded to 1/255. Labels, `y_train` and `y_test`, are integers 0..K-1 of shape (N,). All are
    held in memory; an array that says it is larger than the machine's is refused.

    Raises:
        UserError: whatever of this does not hold, with the array's name and what it holds.
    """
    path = Path(path).expanduser().resolve()
    arrays = _read(path)
    train = _images(arrays, TRAIN, path)
    present = train.labels.unique()
    expected = torch.arange(len(present))
    absent = expected[present != expected]
    if len(absent):
        raise UserError(f"{path}: y_train must hold every class from 0 to its highest, but has no {int(absent[0])}")
    require(len(present) > 1, lambda: f"{path}: y_train has one class only; at least two are needed")
    name, class_names = f"npz:{path}", tuple(str(label) for label in present.tolist())
    if not any(key in arrays for key in TEST):
        kept, held_out = split_for_test(train.labels, str(path))
        return Dataset(name, train.take(kept), train.take(held_out), class_names, note_on_test(len(held_out)))

    test = _images(arrays, TEST, path)
    highest = int(test.labels.max())
    require(highest < len(present), lambda: f"{path}: y_test has class {highest}, which y_train has not")
    shapes = [tuple(images.pixels.shape[1:]) for images in (train, test)]
    require(
        shapes[0] == shapes[1],
        lambda: f"{path}: images are (C, H, W) = {shapes[0]} in x_train, but {shapes[1]} in x_test",
    )
    return Dataset(name, train, test, class_names)


def _read(path: Path) -> dict[str, np.ndarray]:
    require(path.is_file(), lambda: f"npz:{path}: there is no such file")
    require(zipfile.is_zipfile(path), lambda: f"{path} is not an .npz file, or is cut short: write it with numpy.savez")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with zipfile.ZipFile(path) as archive:
            present = [key for key in TRAIN + TEST if f"{key}.npy" in archive.namelist()]
            for key in present:  # all headers before any content
                read_header(archive, key, str(path))
            return {key: read_array(archive, key, str(path), memory) for key in present}
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _images(arrays: dict[str, np.ndarray], keys: tuple[str, str], path: Path | str) -> Images:
    missing = [key for key in keys if key not in arrays]
    require(
        not missing,
        lambda: (
            f"{path}: {' and '.join(missing)} missing; it must hold x_train and y_train, and may hold x_test and y_test"
        ),
    )
    try:
        pixels = _pixels(arrays[keys[0]], f"{path}: {keys[0]}")
        labels = _labels(arrays[keys[1]], f"{path}: {keys[1]}")
    except MemoryError as error:
        raise UserError(f"{path}: {keys[0]} is too large for this machine's memory: save it as uint8") from error
    require(
        len(pixels) == len(labels),
        lambda: f"{path}: {keys[0]} has {len(pixels)} images, but {keys[1]} {len(labels)} labels",
    )
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def _pixels(x: np.ndarray, source: str) -> np.ndarray:
    """Return the images as uint8 (N, C, H, W)."""
    shape = x.shape
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and shape[-1] in (1, 3):
        x = np.moveaxis(x, -1, 1)
    require(
        x.ndim == 4 and x.shape[1] in (1, 3) and x.size > 0,
        lambda: f"{source} has shape {shape}; images are (N, H, W), (N, H, W, C) or (N, C, H, W) with C 1 or 3",
    )
    if x.dtype.kind == "f":
        low, high = x.min(), x.max()  # a NaN anywhere makes both NaN, and the comparison false
        require(
            bool(low >= 0 and high <= 1),
            lambda: f"{source} has floats from {low:g} to {high:g}; they must lie in [0, 1]",
        )
        x = np.rint(x.astype(np.float32) * 255).astype(np.uint8)
    require(x.dtype == np.uint8, lambda: f"{source} has {x.dtype} values; images are uint8, or floats in [0, 1]")
    return np.ascontiguousarray(x)


def _labels(y: np.ndarray, source: str) -> np.ndarray:
    """Return the labels as int64 (N,)."""
    require(y.ndim == 1, lambda: f"{source} has shape {y.shape}; labels are (N,), one integer for each image")
    require(y.dtype.kind in "iu", lambda: f"{source} has {y.dtype} values; labels are integers from 0")
    if (y < 0).any():
        raise UserError(f"{source} has the label {y.min()}; labels are integers from 0")
    return y.astype(np.int64)
