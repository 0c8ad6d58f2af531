"""Which folders are splits by their names, and whether the sub-folders of a folder are splits or classes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from advalign.data.image_files import ImageFolder
from advalign.errors import UserError

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
_WORDS = {
    TRAIN: ("train", "trains", "training", "trainings"),
    VALIDATION: ("val", "vals", "valid", "validation", "validations", "dev", "devs"),
    TEST: ("test", "tests", "testing", "eval", "evals", "evaluation", "evaluations"),
}
_ENDINGS = ("", "set", "sets", "data", "images", "split")  # trainset is written as often as train_set
_SPLIT_OF_WORD = {word + end: split for split, words in _WORDS.items() for word in words for end in _ENDINGS}


def split_of(name: str) -> str | None:
    """Return the split that a folder's name says it is, by a whole word: `train_set` and `MyTrain`, but not `trainers`.

    A name that says two splits, such as `train_test`, says none.
    """
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    named = {_SPLIT_OF_WORD[word.lower()] for word in words if word.lower() in _SPLIT_OF_WORD}
    return named.pop() if len(named) == 1 else None


def decide(top: ImageFolder) -> str:
    """Return `classes` or `splits`, if only one of them makes sense.

    Raises:
        UserError: both do, with what decides.
    """
    splits = {folder.name: split for folder in top.folders if (split := split_of(folder.name))}
    others = [folder for folder in top.folders if folder.name not in splits and folder.count]
    named = [folder for folder in top.folders if folder.name in splits]
    if not named:
        if len(others) < 2:  # a single class is none, and the error says so
            return "classes"
        if shared := _shared_sub_folders(others):
            raise UserError(
                f"{top.path} can be read in two ways, since its sub-folders have the same ones in them "
                f"({some(shared)}): as {len(others)} classes ({some(folder.name for folder in others)}), with --data "
                f"folder-classes:{top.path}, or as splits, if you name them train, val and test"
            )
        if not any(_may_hold_splits(folder) for folder in others):
            return "classes"
        if all(_is_split_below(folder) for folder in others):
            return "splits"
        raise _ambiguous(top, "some sub-folders of classes are named as splits are")
    clean = all(classes_in(folder) and not folder.images for folder in named if folder.count)
    if len(named) == 1 and not others:  # a single class is none
        return "splits" if classes_in(named[0]) else "classes"
    if not others and clean and len(set(splits.values())) == len(splits):
        return "splits"
    if others and len(named) == 1 and not classes_in(named[0]):
        return "classes"
    if not others and len(set(splits.values())) < len(splits):
        raise _ambiguous(top, "two sub-folders are named as the same split")
    if not others:
        raise _ambiguous(top, "sub-folders that are named as splits have images outside of class sub-folders")
    raise _ambiguous(top, "some sub-folders are named as splits, others are not")


def classes_in(folder: ImageFolder) -> list[ImageFolder]:
    """Return the sub-folders that have images."""
    return [each for each in folder.folders if each.count]


def _shared_sub_folders(folders: list[ImageFolder]) -> list[str]:
    """Return the sub-folders that all have, where these could be the classes: at least two, and no image beside them.

    Those that are named as splits are none, as they are read so below each class.
    """
    inner = [[each.name for each in classes_in(folder)] for folder in folders if not folder.images]
    shared = [name for name in inner[0] if all(name in each for each in inner)] if len(inner) == len(folders) else []
    return shared if len(shared) > 1 and not any(map(split_of, shared)) else []


def _may_hold_splits(folder: ImageFolder) -> bool:
    """Tell whether sub-folders of a class could be splits; one named so among others is none."""
    inner = [split_of(each.name) for each in classes_in(folder)]
    return bool(inner) and (None not in inner or len(set(inner) - {None}) > 1)


def _is_split_below(folder: ImageFolder) -> bool:
    """Tell whether all images of a class lie in sub-folders named as splits, each split once."""
    inner = [split_of(each.name) for each in classes_in(folder)]
    return bool(inner) and None not in inner and len(set(inner)) == len(inner) and not folder.images


def _ambiguous(top: ImageFolder, reason: str) -> UserError:
    """Return the error that shows both readings and how to choose one."""
    named = [f"{each.name}/" for each in top.folders if split_of(each.name) and classes_in(each)]
    classes = [folder.name for folder in top.folders if folder.count]
    inner = any(map(_may_hold_splits, top.folders))
    as_splits = " and ".join(named) or ("the sub-folders of each class" if inner else "nothing that has classes")
    return UserError(
        f"{top.path} can be read in two ways, since {reason}: as {len(classes)} classes ({some(classes)}), with "
        f"--data folder-classes:{top.path}, or {as_splits} as splits, with --data folder-splits:{top.path}"
    )


def some(names: Iterable[str]) -> str:
    """Return the names, at most six of them."""
    names = list(names)
    return ", ".join(names if len(names) <= 6 else [*names[:5], f"... {names[-1]}"])
