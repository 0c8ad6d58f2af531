"""What was understood of a user's data, in a few lines that are shown before any work is done."""

from __future__ import annotations

import numpy as np

from advalign.data.images import Dataset, Images

_NAMED = 8  # classes at most whose counts are listed


def describe(dataset: Dataset) -> list[str]:
    """Return what was understood of the user's data: splits, classes with counts, copies, skipped files.

    Data sets that are built in need no description, and have their note, if any.

    Example:
        >>> import advalign as aa
        >>> aa.data.describe(aa.data.load("digits"))
        []
    """
    if not dataset.sources:
        return [f"{dataset.name}: {dataset.note}"] if dataset.note else []
    splits = {"train": dataset.train, "validation": dataset.validation, "test": dataset.test}
    there = {split: images for split, images in splits.items() if images is not None and len(images)}
    names = _shortened(dataset.class_names)
    return [
        f"{dataset.name}: {dataset.classes} {'class' if dataset.classes == 1 else 'classes'}: {names}",
        *(
            f"  {split}: {len(images)} images, {dataset.sources[split]} ({_counts(dataset, images)})"
            for split, images in there.items()
        ),
        *(f"  {remark}" for remark in (*dataset.remarks, *_copies(there))),
    ]


def _counts(dataset: Dataset, images: Images) -> str:
    """Return the number of images of each class, or their range where there are many classes."""
    counts = images.labels.bincount(minlength=dataset.classes).tolist()
    names, absent = dataset.class_names, counts.count(0)
    if len(counts) <= _NAMED:
        return ", ".join(f"{name} {count}" for name, count in zip(names, counts, strict=True))
    low, high = counts.index(min(counts)), counts.index(max(counts))
    none = f"none of {absent} classes, " if absent else ""
    return f"{none}from {counts[low]} of {names[low]} to {counts[high]} of {names[high]}"


def _copies(there: dict[str, Images]) -> list[str]:
    """Return a line for each two splits that share images."""
    pairs = [(a, b) for a, b in (("test", "train"), ("test", "validation"), ("validation", "train"))]
    lines = []
    for a, b in pairs:
        if a in there and b in there and (copies := int(np.isin(there[a].digests, there[b].digests).sum())):
            left_out = "; advalign evaluate leaves them out" if a == "test" else ""
            lines.append(f"copies: {copies} of {len(there[a])} {a} images are also {b} images{left_out}")
    return lines


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= _NAMED else (*names[: _NAMED - 1], f"... {names[-1]}"))
