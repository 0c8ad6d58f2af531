"""How a folder of images is laid out: which sub-folders are splits and which are classes; never guessed in silence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from advalign.data.image_files import SUFFIXES, ImageFolder, natural, scan
from advalign.data.split_names import SPLITS, TEST, TRAIN, classes_in, decide, some, split_of
from advalign.errors import nearly_alike, require

LAYOUTS = ("auto", "classes", "splits", "test")

CLASS_FOLDERS = "class sub-folders"
"""What images are read from that lie in no split."""

ClassFiles = dict[str, list[str]]
"""The paths of the image files of each class, by its name."""


@dataclass(frozen=True)
class Layout:
    """The image files of each split that a folder has, by class, and what was left out."""

    root: Path
    splits: dict[str, ClassFiles]
    """By `train`, `validation` and `test`; classes without images in a split are left out there."""
    folders: dict[str, str]
    """What each split was read from, as it is said to the user: `Train/`."""
    class_names: tuple[str, ...]
    """In natural order."""
    skipped: Counter[str]
    """Files that are no images, by suffix, and folders that are passed over, by name with a slash."""
    left_out: dict[str, int]
    """Images that belong to no class, by their folder."""


def read_layout(root: Path, layout: str = "auto") -> Layout:
    """Read what lies below a folder, as classes or as splits.

    Splits are sub-folders that are named so (see `split_of`) and hold a sub-folder for each class, or sub-folders that
    are named so below each class. One sub-folder named as a split among other classes, with images directly in it, is a
    class.

    Args:
        layout: `classes`, `splits`, `test` (class sub-folders, all for evaluation), or `auto` to decide by the names.

    Raises:
        UserError: nothing that can be read, or, for `auto`, what can be read in two ways.
    """
    top = scan(root)
    if layout == "auto":
        layout = decide(top)
    if layout == "splits":
        return _read_splits(top)
    split = TEST if layout == "test" else TRAIN
    return _layout(top, {split: _class_files(top, 1 if split == TEST else 2)}, {split: CLASS_FOLDERS}, {})


def _read_splits(top: ImageFolder) -> Layout:
    """Read splits with class sub-folders, else class sub-folders with splits."""
    folders: dict[str, ImageFolder] = {}
    for folder in top.folders:
        split = split_of(folder.name)
        if split is None or (folder.images and not classes_in(folder)):
            continue
        require(
            folder.count > 0,
            lambda: f"no images in {folder.path}: looked for {', '.join(SUFFIXES)}; remove it if it is no split",
        )
        require(
            split not in folders,
            lambda: (
                f"{top.path} has two splits of one kind, {folders[split or ''].name}/ and {folder.name}/: move one away"
            ),
        )
        folders[split] = folder
    if not folders:
        return _read_splits_below(top)
    files = {split: {each.name: each.every_image for each in classes_in(folder)} for split, folder in folders.items()}
    if TRAIN in folders:
        _class_files(folders[TRAIN])
    left_out = {f"{folder.name}/": len(folder.images) for folder in folders.values()}
    rest = [folder for folder in top.folders if folder not in folders.values()]
    left_out |= {f"{folder.name}/": folder.count for folder in rest}
    return _layout(top, files, {split: f"{folder.name}/" for split, folder in folders.items()}, left_out)


def _read_splits_below(top: ImageFolder) -> Layout:
    """Read class sub-folders that hold the splits."""
    files: dict[str, ClassFiles] = {}
    folders: dict[str, str] = {}
    left_out: dict[str, int] = {}
    for folder in top.folders:
        for inner in classes_in(folder):
            split, name = split_of(inner.name), f"{folder.name}/{inner.name}/"
            if split is None:
                left_out[name] = inner.count
                continue
            members = files.setdefault(split, {})
            require(folder.name not in members, lambda: f"{folder.path} has two {split} splits: move one away")
            members[folder.name], folders[split] = inner.every_image, f"CLASS/{inner.name}/"
        left_out[f"{folder.name}/"] = len(folder.images)
    require(
        bool(files),
        lambda: f"{top.path} has no splits: no sub-folder named train, validation or test with a sub-folder a class",
    )
    return _layout(top, files, folders, left_out)


def _class_files(folder: ImageFolder, least: int = 2) -> ClassFiles:
    """Return the image files of each class sub-folder, in natural order of the classes.

    Raises:
        UserError: fewer than needed, or one without images.
    """
    count = len(folder.folders)
    inner = folder.folders[0] if count == 1 else None
    hint = f"; did you mean folder:{inner.path}?" if inner and len(classes_in(inner)) > 1 else ""
    direct = f" ({len(folder.images)} images lie directly in it)" if folder.images else ""
    require(
        count >= least,
        lambda: (
            f"{folder.path} has {count} class sub-folder{'s' * (count != 1)}{direct}; at least "
            f"{'two are' if least > 1 else 'one is'} needed, with images in them{hint}"
        ),
    )
    without = [each for each in folder.folders if not each.count]
    found = sum((inner.skipped for each in without for inner in each.every_folder()), Counter[str]())
    require(
        not without,
        lambda: (
            f"no images in {some(str(each.path) for each in without)}: looked for {', '.join(SUFFIXES)}"
            f"{', found ' + counted(found) if found else ''}; remove what is no class, as each sub-folder is one"
        ),
    )
    return {each.name: each.every_image for each in folder.folders}


def _layout(
    top: ImageFolder, files: dict[str, ClassFiles], folders: dict[str, str], left_out: dict[str, int]
) -> Layout:
    """Put the classes of all splits in one natural order; those of training count, where there are any.

    Raises:
        UserError: a class that the training images do not have, or only one in them.
    """
    names = sorted(files.get(TRAIN) or {name for split in files.values() for name in split}, key=natural)
    for split, members in files.items():
        more = sorted(members.keys() - set(names), key=natural)
        unsorted = f"; sort the images of {folders[split]} into class sub-folders, or move it away"
        require(
            not more,
            lambda: (
                f"{top.path}: {folders[split]} has classes that {folders[TRAIN]} has not: {some(more)}; those of "
                f"{folders[TRAIN]} are {some(names)}"
                f"{nearly_alike(more, names) or (unsorted if len(members) == 1 else '')}"
            ),
        )
    require(
        len(names) > 1 or TRAIN not in files,
        lambda: f"{top.path} has 1 class with training images; at least two are needed",
    )
    there = [split for split in SPLITS if split in files]
    ordered = {split: {name: files[split][name] for name in names if name in files[split]} for split in there}
    skipped = sum((folder.skipped for folder in top.every_folder()), Counter[str]())
    left_out = {f"{top.name}/": len(top.images), **left_out}
    return Layout(
        top.path, ordered, folders, tuple(names), skipped, {name: count for name, count in left_out.items() if count}
    )


def counted(kinds: Counter[str]) -> str:
    """Return what there is of each kind, of at most six kinds."""
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6)) + (", ..." if len(kinds) > 6 else "")
