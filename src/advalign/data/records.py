"""Images in Parquet files or tar archives, decoded once into the cache like image files; both are data, no programs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch

from advalign.data.cache import Rows, cached_array
from advalign.data.decode import check_size, decode, preprocessing
from advalign.data.held_out import hold_out_by_content, note_on_test
from advalign.data.image_cache import cached_images
from advalign.data.images import Dataset
from advalign.data.split_names import TEST, TRAIN, VALIDATION, split_of
from advalign.errors import require
from advalign.runtime.files import digest
from advalign.runtime.near import near_path

Record = tuple[str, bytes]
"""Where an image stands, as it is said to the user, and the content of its file."""
_CLASSES = 1_000_000


@dataclass(frozen=True)
class Records:
    """The encoded images of a file with their labels."""

    file: Path
    labels: np.ndarray
    """(N,) integers from 0."""
    read: Callable[[int], Iterator[Record]]
    """Yields the images from a number on."""

    def places(self) -> Iterator[str]:
        """Yield where each image stands."""
        return (f"{self.file}[{row}]" for row in range(len(self.labels)))


Open = Callable[[Path], Records]


def files_of(kind: str, path: Path, suffix: str) -> dict[str, list[Path]]:
    """Return the files below a folder, or the one that is named, by split, in the order of their names.

    A file belongs to the split that its name, or the name of a folder around it, says; one that says none is for
    training where no file says any.

    Raises:
        UserError: there are none, or some say a split and others do not.
    """
    require(path.exists(), lambda: f"{kind}:{path}: there is no such file or folder{near_path(path)}")
    files = sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]
    require(bool(files), lambda: f"{kind}:{path}: there are no {suffix} files in it")
    splits: dict[str, list[Path]] = {}
    for file in files:
        names = [file.stem, *(parent.name for parent in file.parents if parent.is_relative_to(path))]
        split = next((split for name in names if (split := split_of(name))), None)
        splits.setdefault(split or "", []).append(file)
    unsaid = splits.pop("", [])
    require(
        not (unsaid and splits),
        lambda: (
            f"{kind}:{path}: {unsaid[0].name} says no split, and others do: name files or their folders train, "
            "validation or test"
        ),
    )
    return splits or {TRAIN: unsaid}


def load_records(kind: str, path: Path, suffix: str, open_file: Open, class_names: Sequence[str], size: int) -> Dataset:
    """Return the data set in the files below a path, resized and cached as `load_folder` does with image files.

    Args:
        open_file: reads the labels of a file, and then its images in order.
        class_names: empty where classes have numbers alone.

    Raises:
        UserError: files that cannot be read or do not fit together, or a cache that cannot be written.
    """
    check_size(size)
    name, files = f"{kind}:{path}", files_of(kind, path, suffix)
    opened = {
        split: [open_file(file) for file in files[split]] for split in (TRAIN, VALIDATION, TEST) if split in files
    }
    labels = {split: np.concatenate([each.labels for each in parts]) for split, parts in opened.items()}
    if TRAIN not in opened and TEST not in opened:
        opened[TEST], labels[TEST] = opened.pop(VALIDATION), labels.pop(VALIDATION)
    names = _class_names(name, labels, class_names)
    every = [each for parts in opened.values() for each in parts]
    states = [(str(each.file), each.file.stat().st_size, each.file.stat().st_mtime_ns) for each in every]
    key, target = digest(json.dumps([kind, states])), torch.from_numpy(np.concatenate(list(labels.values())))

    def items(first: int) -> Iterator[Record]:
        return _from(every, first)

    images = cached_images(
        digest(json.dumps([key, size])), target, size, items, lambda record: decode(BytesIO(record[1]), record[0], size)
    )
    parts = dict(zip(opened, images.split([len(each) for each in labels.values()]), strict=True))
    sources = {split: f"from {len(opened[split])} {suffix} file{'s' * (len(opened[split]) > 1)}" for split in opened}
    places = {split: [place for each in opened[split] for place in each.places()] for split in opened}
    note = ""
    if held_out := TEST not in parts:
        rows = Rows("reading images", (len(target),), np.uint64, items, lambda record: _digest(record[1]))
        whole, its = parts[TRAIN], places[TRAIN]
        contents = cached_array(f"files-{key}.npy", rows)[: len(whole)]
        for split, chosen in zip((TRAIN, TEST), hold_out_by_content(contents, whole.labels, name, names), strict=True):
            parts[split], places[split] = whole.take(chosen), [its[row] for row in chosen.tolist()]
        note = note_on_test(len(parts[TEST]), len(whole))
        sources[TEST] = f"held out of {TRAIN} by their content, about 20 %"
    return Dataset(
        name, parts.get(TRAIN, parts[TEST].take([])), parts[TEST], names, note, named=bool(class_names),
        validation=parts.get(VALIDATION) if TRAIN in parts else None, preprocessing=preprocessing(size),
        held_out=held_out, sources=sources, places=places,
    )  # fmt: skip


def _from(every: Sequence[Records], first: int) -> Iterator[Record]:
    """Yield the images of all files from a number on."""
    for each in every:
        if first < len(each.labels):
            yield from each.read(first)
        first = max(0, first - len(each.labels))


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:8]


def _class_names(name: str, labels: dict[str, np.ndarray], class_names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes, or their numbers as texts; training images must have each.

    Raises:
        UserError: a label that stands for no class, or a class without training images.
    """
    lowest = min(int(each.min()) for each in labels.values())
    require(lowest >= 0, lambda: f"{name} has the label {lowest}; labels are integers from 0")
    highest = max(int(each.max()) for each in labels.values())
    count = len(class_names) or (int(labels[TRAIN].max()) if TRAIN in labels else highest) + 1
    require(highest < count, lambda: f"{name} has the label {highest}, and {count} classes: 0 to {count - 1}")
    require(count <= _CLASSES, lambda: f"{name} has the label {count - 1}; there are at most {_CLASSES} classes")
    names = tuple(class_names) or tuple(map(str, range(count)))
    if TRAIN in labels:
        absent = np.setdiff1d(np.arange(count), labels[TRAIN])
        require(not len(absent), lambda: f"{name}: there are no training images of class {names[absent[0]]}")
        require(count > 1, lambda: f"{name} has 1 class with training images; at least two are needed")
    return names
