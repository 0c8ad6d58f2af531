"""What was understood of a user's data, in a few lines that are shown before any work is done."""

from __future__ import annotations

import numpy as np

from advalign.data.images import Dataset, Images
from advalign.errors import plain_name

_NAMED = 8  # classes at most whose counts are listed
_BRIGHT = 64 / 255  # 14 bits in 16 are darker, and photographs of one's own are not


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
        *(f"  {remark}" for remark in (*dataset.remarks, *_copies(there), *_doubts(dataset, there))),
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


def _doubts(dataset: Dataset, there: dict[str, Images]) -> list[str]:
    """Return lines on what is mostly a mistake: images in two classes, classes of nearly one name, dark images."""
    return [line for line in (_in_two_classes(dataset, there), _alike(dataset.class_names), _dark(there)) if line]


def _alike(names: tuple[str, ...]) -> str:
    """Return a line on the first class whose name differs from another's in case or spaces alone."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(plain_name(name), name)
        if other != name:
            return f"classes {other!r} and {name!r} differ in case or spaces alone"
    return ""


def _in_two_classes(dataset: Dataset, there: dict[str, Images]) -> str:
    """Return a line on equal images with different labels, with the first two."""
    digests = np.concatenate([images.digests for images in there.values()])
    labels = np.concatenate([images.labels.cpu().numpy() for images in there.values()])
    order = np.lexsort((labels, digests))
    ranked, classes = digests[order], labels[order]
    twice = np.unique(ranked[1:][(ranked[1:] == ranked[:-1]) & (classes[1:] != classes[:-1])])
    if not len(twice):
        return ""
    first = np.flatnonzero(np.isin(digests, twice))[0]
    second = np.flatnonzero((digests == digests[first]) & (labels != labels[first]))[0]
    root = f"{dataset.name.partition(':')[2]}/"
    places = [str(place).removeprefix(root) for split in there for place in dataset.places[split]]
    verb = "1 image is" if len(twice) == 1 else f"{len(twice)} images are"
    return f"{verb} in two classes or more, such as {places[first]} and {places[second]}"


def _dark(there: dict[str, Images]) -> str:
    """Return a line on splits without a bright pixel, as of values that do not fill the range of their type."""
    scales = {split: 1 if images.dtype.is_floating_point else 255 for split, images in there.items()}
    peaks = {split: _peak(images, _BRIGHT * scales[split]) for split, images in there.items()}
    dark = [split for split, peak in peaks.items() if peak <= _BRIGHT * scales[split]]
    if not dark:
        return ""
    highest = ", ".join(f"{peaks[split]:.3g} of {scales[split]} in {split}" for split in dark)
    return (
        f"images are dark, the highest value is {highest}: scale values that do not fill the range of their type, such "
        "as masks of 0 and 1 or 12 bits in 16"
    )


def _peak(images: Images, enough: float) -> float:
    """Return the highest value of all pixels, or of the first images among which one is high enough."""
    peak = 0.0
    for part in images.parts():
        peak = max(peak, float(images.read(part).max()))
        if peak > enough:
            break
    return peak


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names if len(names) <= _NAMED else (*names[: _NAMED - 1], f"... {names[-1]}"))
