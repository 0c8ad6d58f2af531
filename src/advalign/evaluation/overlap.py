"""Test images that a model has been trained or selected on: found by content, and left out of what is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advalign.data import NAMES, Dataset
from advalign.data.images import Digests
from advalign.errors import require
from advalign.runs import Run
from advalign.runs.run import data_kind
from advalign.runs.trained_on import UNKNOWN, read_trained_on


def leave_out_seen(dataset: Dataset, path: Path, card: Mapping[str, Any]) -> Dataset:
    """Return a data set without the test images of which a model, or its training images, have a copy.

    The official test sets stay whole, since numbers on parts of them would not compare with others; what they share
    with the training images is said in the note. Runs of versions that did not keep their images' digests are known to
    overlap only with the training images of the data set itself.

    Args:
        path: the model's weights file; what it was trained and selected on is read from its run's folder.
        card: what the file says of itself.

    Raises:
        UserError: nothing is left to measure, or the test images were held out by a rule that the model's version did
            not know.
    """
    official = dataset.name in NAMES
    trained_on = read_trained_on(path.resolve().parent) if "run" in card else None
    if trained_on is None:
        _require_same_rule(dataset, path, card)
    if unknown := _unknown(dataset, path, card, trained_on):
        dataset = replace(dataset, note=_joined(dataset.note, unknown))
    of_data = [] if official else [part.digests for part in (dataset.train, dataset.validation) if part is not None]
    seen = np.concatenate([np.empty(0, np.uint64) if trained_on is None else trained_on, *of_data])
    copies = torch.from_numpy(np.isin(dataset.test.digests, seen)) if len(seen) else torch.zeros(0, dtype=torch.bool)
    count, total = int(copies.sum()), len(dataset.test)
    if not count:
        return dataset
    if official:
        note = f"{count} of the {total} test images are copies of images that the model was trained or selected on"
        return replace(dataset, note=_joined(dataset.note, f"{note}; they count, as everywhere on this test set"))
    require(
        count < total,
        lambda: (
            f"nothing to measure: all {total} test images of {dataset.name} are copies of images that {path} was "
            "trained or selected on, or of training images; name other data with --data"
        ),
    )
    of_what = (
        "the data's own training images" if trained_on is None else "images that the model was trained or selected on"
    )
    note = f"{count} of {total} test images are left out, copies of {of_what}"
    return replace(dataset, test=dataset.test.take((~copies).nonzero()[:, 0]), note=_joined(dataset.note, note))


def _unknown(dataset: Dataset, path: Path, card: Mapping[str, Any], trained_on: Digests | None) -> str:
    """Return what is not known of the images that a model has seen, where they may be among the test images."""
    if "run" not in card:
        its, doubtful = "the model was trained on is not known", dataset.held_out
    elif trained_on is None:
        its = (
            "the model was trained and selected on is not known, as its weights lie outside of their run's folder or "
            "are of an earlier version"
        )
        doubtful = dataset.name not in NAMES and not _is_trained_on(dataset, path)
    else:
        its = "the weights were trained on from which the model has learned is not known"
        doubtful = dataset.held_out and UNKNOWN in trained_on
    return f"which images {its}: such images may be among those that are measured" if doubtful else ""


def _require_same_rule(dataset: Dataset, path: Path, card: Mapping[str, Any]) -> None:
    """Refuse held-out images for a run of an earlier version, which held out other ones and did not keep which."""
    earlier = "run" in card and "images" not in card and data_kind(card.get("data", "")) in ("folder", "npz")
    if not (dataset.held_out and earlier):
        return
    require(
        _is_trained_on(dataset, path),
        lambda: (
            f"{path} was trained by an earlier version, which held out other test images of {card['data']}: those held "
            "out now may be among its training images; train again, or name images that it has not seen, "
            "with --data folder-test:PATH or an npz file of x_test and y_test"
        ),
    )


def _is_trained_on(dataset: Dataset, path: Path) -> bool:
    """Tell whether the run's folder says that it was trained on these very data, whose splits then are its own."""
    folder = path.resolve().parent
    known = (dataset.training_digest, dataset.digest)  # the latter of earlier versions
    return (folder / "run.json").is_file() and Run.read(folder).setting.get("images") in known


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))
