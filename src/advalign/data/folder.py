"""A user's own image files in class sub-folders, decoded once into a memory-mapped cache."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from advalign.data.cache import Rows, cached_array
from advalign.data.decode import check_size, decode, preprocessing
from advalign.data.held_out import hold_out_by_content, note_on_test
from advalign.data.image_cache import cached_images
from advalign.data.images import Dataset, Digests, Images
from advalign.data.layout import CLASS_FOLDERS, ClassFiles, Layout, counted, read_layout
from advalign.data.split_names import TEST, TRAIN, VALIDATION, split_of
from advalign.errors import UserError, require
from advalign.runtime.files import digest, full_path
from advalign.runtime.near import near_path
from advalign.shapes import Labels

State = tuple[str, int, int]
"""What tells that a file has changed: its name below the folder, size and date."""


def load_folder(path: Path | str, image_size: int, layout: str = "auto") -> Dataset:
    """Return the images below a folder: class sub-folders, or splits with class sub-folders (see `read_layout`).

    Images are turned upright (EXIF), converted to RGB without their alpha, 16 bits scaled to 8, resized so that the
    shorter side is `image_size` (bicubic), cropped at the centre, and kept as uint8 in a cache, which is made anew when
    a file's name, size or date changes. Of several frames, the first is read. An image file has at most 100 million
    pixels.

    A validation split selects checkpoints, so it is never the test set beside training images: where there is no test
    split, about a fifth of the training images is held out, by the content of the files. Without training images, the
    test split, else the validation split, is there to be measured.

    Args:
        layout: `auto`, or one that is known: `classes`, `splits` or `test`.

    Returns:
        Images (N, 3, image_size, image_size), mapped from the cache, not held in memory; drawing part of them, as a
        training does to hold out its validation set, copies that part into memory.

    Raises:
        UserError: no such folder, no images in it, fewer than two classes, a folder that can be read in two ways, a
            class without training images, an image that cannot be read, or a cache that cannot be written.
    """
    root = full_path(path)
    name = f"folder{'' if layout == 'auto' else f'-{layout}'}:{root}"
    instead = f"write npz:{path}" if root.suffix == ".npz" else "unpack it if it is an archive"
    require(not root.is_file(), lambda: f"{name}: it is a file and no folder; {instead}")
    require(root.is_dir(), lambda: f"{name}: there is no such folder{near_path(path)}")
    check_size(image_size)
    read = read_layout(root, layout)
    files = {split: _flat(members, read.class_names) for split, members in read.splits.items()}
    below = len(os.path.join(root, ""))
    states = {file: _state(file, file[below:]) for members, _ in files.values() for file in members}
    sources = {split: f"from {folder}" for split, folder in read.folders.items()}
    note = ""
    held_out = TRAIN in files and TEST not in files
    if held_out:
        train, labels = files[TRAIN]
        rows = hold_out_by_content(_file_digests(root, train, states), labels, name, read.class_names)
        files[TRAIN], files[TEST] = (([train[row] for row in part.tolist()], labels[part]) for part in rows)
        sources[TEST] = f"held out of {read.folders[TRAIN]} by their content, about 20 %"
        note = note_on_test(len(rows[1]), len(train))
    elif TRAIN not in files and TEST not in files:
        files[TEST], sources[TEST] = files.pop(VALIDATION), sources.pop(VALIDATION)
    elif TRAIN not in files and VALIDATION in files:
        del files[VALIDATION]  # nothing is trained, so nothing is selected
    images = _images(root, files, states, image_size)
    places = {split: members for split, (members, _) in files.items()}
    test = images[TEST]
    return Dataset(
        name, images.get(TRAIN, test.take([])), test, read.class_names, note, validation=images.get(VALIDATION),
        preprocessing=preprocessing(image_size), held_out=held_out, sources=sources,
        remarks=_remarks(read, guessed=layout == "auto"), places=places,
    )  # fmt: skip


def _flat(members: ClassFiles, class_names: tuple[str, ...]) -> tuple[list[str], Labels]:
    files = [file for each in members.values() for file in each]
    counts = torch.tensor([len(members.get(name, ())) for name in class_names])
    return files, torch.arange(len(class_names)).repeat_interleave(counts)


def _remarks(layout: Layout, *, guessed: bool) -> tuple[str, ...]:
    """Return lines on files that are no images, on images that belong to no class, and on what may be no class."""
    files, folders = (
        Counter({kind: count for kind, count in layout.skipped.items() if kind.endswith("/") == is_folder})
        for is_folder in (False, True)
    )
    total = files.total()
    skipped = [f"{total} {'file' if total == 1 else 'files'} skipped: {counted(files)}"] if files else []
    skipped += [f"folders skipped: {counted(folders)}"] if folders else []
    places = ", ".join(f"{count} in {folder}" for folder, count in Counter(layout.left_out).most_common(6))
    left_out = [f"images outside of the classes left out: {places}"] if places else []
    as_classes = guessed and layout.folders.get(TRAIN) == CLASS_FOLDERS
    doubtful = [
        f"{name}/ is read as a class, since images lie directly in it: if it is none, move it away"
        for name in layout.class_names
        if as_classes and split_of(name)
    ]
    return (*skipped, *left_out, *_nested(layout), *doubtful)


def _nested(layout: Layout) -> list[str]:
    """Return a line on the sub-folders of classes, whose images count to the class."""
    folders: dict[str, None] = {}
    for split, members in layout.splits.items():
        depth = 1 if layout.folders[split] == CLASS_FOLDERS else 2
        for folder in dict.fromkeys(file.rpartition(os.sep)[0] for files in members.values() for file in files):
            parts = Path(folder).relative_to(layout.root).parts
            if len(parts) > depth:
                folders["/".join(parts)] = None
    shown = ", ".join(list(folders)[:6]) + ", ..." * (len(folders) > 6)
    return [f"images in sub-folders of a class belong to it: {shown}"] if folders else []


def _images(
    root: Path, files: Mapping[str, tuple[list[str], Labels]], states: Mapping[str, State], size: int
) -> dict[str, Images]:
    """Return the images of each split, which lie one after another in one cache, so that each is a slice of it."""
    every = [file for members, _ in files.values() for file in members]
    key = digest(json.dumps([str(root), [states[file] for file in every], size]))
    labels = torch.cat([labels for _, labels in files.values()])
    images = cached_images(key, labels, size, lambda first: every[first:], lambda file: decode(file, file, size))
    return dict(zip(files, images.split([len(members) for members, _ in files.values()]), strict=True))


def _file_digests(root: Path, files: list[str], states: Mapping[str, State]) -> Digests:
    """Return the first 8 bytes of the SHA-256 of each file's content, which no image size changes."""
    key = digest(json.dumps([str(root), [states[file] for file in files]]))
    rows = Rows("reading files", (len(files),), np.uint64, lambda first: files[first:], _file_digest)
    return cached_array(f"files-{key}.npy", rows)


def _state(file: str, name: str) -> State:
    try:
        state = os.stat(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return name, state.st_size, state.st_mtime_ns


def _file_digest(file: str) -> bytes:
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").digest()[:8]
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
