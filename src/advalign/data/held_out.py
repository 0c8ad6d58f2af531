"""Test and validation sets of data that come without: held out image by image, by content, not by name or place."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import numpy as np
import torch

from advalign.data.images import SPLIT_SEED, Digests, Images, RowNumbers, class_shares
from advalign.errors import require
from advalign.shapes import Labels

SHARE = 0.2
"""Of the images that are held out, on average."""


def hold_out_by_content(
    contents: Digests, labels: Labels, source: str, class_names: Sequence[str] = ()
) -> tuple[RowNumbers, RowNumbers]:
    """Hold out an image if the SHA-256 of its content and a fixed seed, read as a fraction, is below 0.2.

    So images stay on their side when others are added, removed or renamed, and copies of an image are on one side. The
    one case in which others matter: a class that would have no test image gives the one with its lowest fraction, and
    one that would have no training image keeps that with its highest.

    Args:
        contents: equal where images are.
        labels: (N,) int64, each class from 0 present.
        source: the name of the data in the error.
        class_names: of the classes in the error; their numbers if empty.

    Returns:
        Row numbers (train, test), each ascending.

    Raises:
        UserError: a class has fewer than two different images.
    """
    fractions = np.array([_fraction(SPLIT_SEED, int(content)) for content in contents])
    test = fractions < SHARE
    members = [np.flatnonzero(labels.numpy() == label) for label in range(int(labels.max()) + 1)]
    for rows in members:
        ranked = rows[fractions[rows].argsort(kind="stable")]
        for extreme, side in ((ranked[0], True), (ranked[-1], False)):
            if not (test[rows] == side).any():
                test[contents == contents[extreme]] = side
    small = [label for label, rows in enumerate(members) if not 0 < test[rows].sum() < len(rows)]
    names = [class_names[label] if class_names else str(label) for label in small[:6]]
    require(
        not small,
        lambda: (
            f"{source}: too few images to hold out a test set: 2 different ones of each class are needed, and there is "
            f"only one of {', '.join(names)}{', ...' * (len(small) > len(names))}"
        ),
    )
    return torch.from_numpy(np.flatnonzero(~test)), torch.from_numpy(np.flatnonzero(test))


def hold_out_validation(images: Images, size: int, seed: int) -> tuple[Images, Images]:
    """Hold out of each class its share of the validation images: those with the lowest fractions, as above.

    So the order of the images does not count, and adding some moves few others. Copies of an image are on one side,
    for which there may be a few more than `size`. The image of a class with its highest fraction is trained on.

    Returns:
        (rest, validation), each in the order of `images`.

    Raises:
        UserError: nothing would be held out, or nothing left to train on.
    """
    contents, labels = images.digests, images.labels.cpu().numpy()
    fractions = np.array([_fraction(seed, int(content)) for content in contents])
    members = [np.flatnonzero(labels == label) for label in range(int(labels.max()) + 1)]
    ranked = [rows[fractions[rows].argsort(kind="stable")] for rows in members]
    kept = contents[[rows[-1] for rows in ranked if len(rows)]]
    free = [rows[~np.isin(contents[rows], kept)] for rows in ranked]
    shares = class_shares(images.labels, size).tolist()
    drawn = np.concatenate([contents[rows[:share]] for rows, share in zip(free, shares, strict=True)])
    held_out = np.isin(contents, drawn)
    require(
        0 < held_out.sum() < len(images),
        lambda: f"cannot hold out {size} of {len(images)} training images: too few of them are different",
    )
    rest, validation = (images.take(torch.from_numpy(np.flatnonzero(side))) for side in (~held_out, held_out))
    return rest, validation


def _fraction(seed: int, content: int) -> float:
    return int.from_bytes(sha256(f"{seed}, {content}".encode()).digest()[:8]) / 2**64


def note_on_test(test: int, total: int) -> str:
    """Return the note on a data set whose test set was held out by content."""
    return f"no test set was given: {test} of {total} images, about 20 %, were held out by their content as test set"
