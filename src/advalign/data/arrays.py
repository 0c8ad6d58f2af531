"""A user's own arrays in an `.npz` file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import numpy as np
import torch

from advalign.data.array_values import hint_on_classes, to_labels, to_pixels
from advalign.data.held_out import hold_out_by_content, note_on_test
from advalign.data.images import Dataset, Images
from advalign.data.npy import read_array, read_header
from advalign.errors import UserError, require, shorten
from advalign.runtime.files import full_path
from advalign.runtime.near import near_path
from advalign.shapes import Labels

TRAIN, VALIDATION, TEST = ("x_train", "y_train"), ("x_val", "y_val"), ("x_test", "y_test")
CLASS_NAMES = "class_names"


def load_npz(path: Path | str) -> Dataset:
    """Return the data set in an `.npz` file; without test arrays, about a fifth of the images is held out by content.

    Images, `x_train` and `x_test`, are uint8 or floats in [0, 1], of shape (N, H, W), (N, H, W, C) or (N, C, H, W) with
    C 1 or 3. Floats stay floats, in single precision, in which networks compute; those that are all multiples of 1/255
    are kept as uint8, without loss. Labels, `y_train` and `y_test`, are integers 0..K-1 of shape (N,); `class_names`,
    (K,) texts, may name the classes. `x_val` and `y_val`, where they are there, select checkpoints. `x_test` and
    `y_test` alone, of some of the classes, serve evaluation. All are held in memory; an array that says it is larger
    than the machine's is refused.

    Raises:
        UserError: whatever of this does not hold, with the array's name and what it holds.
    """
    path = full_path(path)
    arrays, others = _read(path)
    class_names = _class_names(arrays, path)
    trains, tests = (any(key in arrays for key in keys) for keys in (TRAIN, TEST))
    test = _images(arrays, TEST, path, others) if tests else None
    if not trains and test is not None:
        train, classes = test.take([]), len(class_names) or int(test.labels.max()) + 1
    else:
        train = _images(arrays, TRAIN, path, others)
        classes = _count_classes(train.labels, class_names, path)
    name, named, note = f"npz:{path}", bool(class_names), ""
    class_names = class_names or tuple(map(str, range(classes)))
    sources = {"train": TRAIN[0], "test": TEST[0]}
    rows: dict[str, Sequence[int]] = {"train": range(len(train)), "test": range(0 if test is None else len(test))}
    if held_out := test is None:
        kept, taken = hold_out_by_content(train.digests, train.labels, str(path), class_names)
        rows = {"train": kept.tolist(), "test": taken.tolist()}
        sources["test"] = f"held out of {TRAIN[0]} by their content, about 20 %"
        note = note_on_test(len(taken), len(train))
        train, test = train.take(kept), train.take(taken)
    _require_fit(test, TEST, train, classes, path, TRAIN if trains else CLASS_NAMES)
    validation = None
    if trains and any(key in arrays for key in VALIDATION):
        validation, sources["validation"] = _images(arrays, VALIDATION, path, others), VALIDATION[0]
        _require_fit(validation, VALIDATION, train, classes, path, TRAIN)
        rows["validation"] = range(len(validation))
    arrays_of = {"train": TRAIN[0], "validation": VALIDATION[0], "test": TRAIN[0] if held_out else TEST[0]}
    places = {split: [f"{arrays_of[split]}[{row}]" for row in each] for split, each in rows.items()}
    return Dataset(
        name, train, test, class_names, note, named=named, validation=validation, held_out=held_out, sources=sources,
        remarks=_remarks(others, train, test), places=places,
    )  # fmt: skip


def _remarks(others: list[str], train: Images, test: Images) -> tuple[str, ...]:
    """Return lines on arrays that are not read, and on labels of test images alone that seem to count from 1."""
    present = test.labels.unique().tolist()
    from_one = not len(train) and len(present) > 1 and present == list(range(1, len(present) + 1))
    return (
        *([f"arrays that are not read: {shorten(', '.join(others))}"] if others else []),
        *([f"no label is 0, and each from 1 to {len(present)} is there: labels count from 0"] if from_one else []),
    )


def _require_fit(
    images: Images, keys: tuple[str, str], train: Images, classes: int, path: Path, named: tuple[str, str] | str
) -> None:
    """Refuse images of another shape than the training images, or of a class that there is not."""
    highest = int(images.labels.max())
    require(
        highest < classes,
        lambda: f"{path}: {keys[1]} has class {highest}, which {named if isinstance(named, str) else named[1]} has not",
    )
    shapes = [tuple(each.pixels.shape[1:]) for each in (train, images)]
    require(
        shapes[0] == shapes[1],
        lambda: f"{path}: images are (C, H, W) = {shapes[0]} in x_train, but {shapes[1]} in {keys[0]}",
    )


def _count_classes(labels: Labels, class_names: tuple[str, ...], path: Path) -> int:
    """Return the number of classes of training labels, which must hold each."""
    present = labels.unique()
    expected = torch.arange(len(present))
    absent = expected[present != expected]
    if len(absent):
        raise UserError(
            f"{path}: y_train must hold every class from 0 to its highest, but has no {int(absent[0])}"
            f"{hint_on_classes(present.numpy())}"
        )
    require(len(present) > 1, lambda: f"{path}: y_train has one class only; at least two are needed")
    require(
        len(class_names) in (0, len(present)),
        lambda: f"{path}: {CLASS_NAMES} names {len(class_names)} classes, but y_train has {len(present)}",
    )
    return len(present)


def _read(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """Read the arrays that a data set consists of; return them by name, and the names of the others."""
    require(not path.is_dir(), lambda: f"npz:{path}: there is no such file, but a folder: write folder:{path}")
    require(path.is_file(), lambda: f"npz:{path}: there is no such file{near_path(path)}")
    require(zipfile.is_zipfile(path), lambda: f"{path} is not an .npz file, or is cut short: write it with numpy.savez")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            require(
                bool(names) or not archive.namelist(),
                lambda: f"{path} is a zip archive without arrays: write it with numpy.savez",
            )
            present = [key for key in (*TRAIN, *VALIDATION, *TEST, CLASS_NAMES) if key in names]
            for key in present:  # all headers before any content
                read_header(archive, key, str(path))
            arrays = {key: read_array(archive, key, str(path), memory) for key in present}
            return arrays, [name for name in names if name not in present]
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _images(arrays: dict[str, np.ndarray], keys: tuple[str, str], path: Path | str, others: list[str]) -> Images:
    missing = [key for key in keys if key not in arrays]
    if keys == VALIDATION and missing:
        raise UserError(f"{path}: {missing[0]} missing; x_val and y_val belong together")
    has = f", and has {shorten(', '.join(others))}: save those under these names" if others else ""
    require(
        not missing,
        lambda: (
            f"{path}: {' and '.join(missing)} missing; it must hold x_train and y_train, x_test and y_test, or all four"
            f"{has}"
        ),
    )
    try:
        pixels = to_pixels(arrays[keys[0]], f"{path}: {keys[0]}")
        labels = to_labels(arrays[keys[1]], f"{path}: {keys[1]}")
    except MemoryError as error:
        raise UserError(f"{path}: {keys[0]} is too large for this machine's memory: save it as uint8") from error
    require(
        len(pixels) == len(labels),
        lambda: f"{path}: {keys[0]} has {len(pixels)} images, but {keys[1]} {len(labels)} labels",
    )
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))


def _class_names(arrays: dict[str, np.ndarray], path: Path) -> tuple[str, ...]:
    """Return the names of the classes; none where the file does not name them."""
    if CLASS_NAMES not in arrays:
        return ()
    names = arrays[CLASS_NAMES]
    require(
        names.ndim == 1 and names.dtype.kind == "U",
        lambda: (
            f"{path}: {CLASS_NAMES} has {names.dtype} values of shape {names.shape}; it must be texts (K,)"
            + (": save class_names.astype(str)" if names.dtype.kind == "S" else "")
        ),
    )
    texts = [normalize("NFC", name) for name in names.tolist()]
    require(len(set(texts)) == len(texts), lambda: f"{path}: {CLASS_NAMES} has a name twice")
    return tuple(texts)
