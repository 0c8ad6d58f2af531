"""Accuracy by class, clean and under attack, from the outcomes that an evaluation keeps of every image."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from advalign.attacks.names import parse_name
from advalign.data import Dataset, load, stratified_subset
from advalign.data.cache import cache_folder
from advalign.errors import require
from advalign.evaluation.overlap import leave_out_seen
from advalign.evaluation.target import SUBSET_SEED
from advalign.report.tables import Table

_NUMBERED = 12  # up to this many classes, the figure has room for numbers

Accuracies = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""Clean and robust accuracy of each class in per cent, by model."""


def dataset_of(name: str, digest: str, image_size: int, directory: str | Path | None) -> Dataset:
    """Load a data set that is on this machine; nothing is downloaded for a report.

    Raises:
        UserError: it is not here, or its digest is another one.
    """
    data = load(name, directory=directory or os.environ.get("ADVALIGN_DATA") or cache_folder(), image_size=image_size)
    if data.digest != digest:  # copies of training images may have been left out
        data = leave_out_seen(data, Path(), {})
    require(
        data.digest == digest,
        lambda: (
            f"{name} is not what was measured (digest {digest}, now {data.digest}): it has changed, was read at "
            "another --image-size, or images were left out that the model was trained on"
        ),
    )
    return data


def labels_of(data: Dataset, n: int) -> Tensor:
    """Return the labels of the n test images that an evaluation takes."""
    return stratified_subset(data.test, n, SUBSET_SEED).labels


def outcomes_of(evaluation: Mapping[str, Any], worst: str) -> tuple[Tensor, Tensor]:
    """Return which images (N,) are classified correctly, and which withstand all attacks of a worst case.

    Raises:
        UserError: the outcomes contradict the recorded accuracies.
    """
    flags = {
        name: torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8) == ord("1")
        for name, text in evaluation["outcomes"].items()
    }
    robust = torch.stack([flags[name] for name in ("clean", *parse_name(worst).members)]).all(0)
    recorded = {record["attack"]: record["accuracy"] for record in evaluation["records"]}
    for attack, correct in (("clean", flags["clean"]), (worst, robust)):
        share = float(correct.double().mean())
        require(
            abs(share - recorded[attack]) < 1e-9, lambda: f"outcomes give {share:.4f} for {attack}, not the record's"
        )
    return flags["clean"], robust


def by_class(correct: Sequence[Tensor], labels: Tensor, classes: int) -> list[float]:
    """Return each class's accuracy in per cent, the mean over seeds; NaN for a class without images.

    Args:
        correct: for each seed, which images (N,) are classified correctly.
        labels: (N,) int64.
    """
    of_class = [labels == k for k in range(classes)]
    return [100 * mean(float(flags[rows].double().mean()) for flags in correct) for rows in of_class]


def class_table(accuracies: Accuracies, class_names: Sequence[str], caption: str) -> Table:
    """Tabulate clean and robust accuracy of each model, a row for each class."""
    columns = [f"{model}: {view}" for model in accuracies for view in ("clean", "robust")]
    values = [view for pair in accuracies.values() for view in pair]
    rows = tuple(
        (name, *("–" if isnan(view[k]) else f"{view[k]:.1f}" for view in values)) for k, name in enumerate(class_names)
    )
    return Table(("class", *columns), rows, frozenset(), caption)


def class_figure(accuracies: Accuracies, class_names: Sequence[str]) -> Figure:
    """Draw clean and robust accuracy as two maps, a row for each model, a column for each class."""
    models, classes = list(accuracies), len(class_names)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(max(9.0, 0.14 * classes), min(300.0, 1.6 + 0.36 * len(models))), layout="constrained")
        grid = figure.subplots(1, 2, sharey=True)
        grid[0].set_ylim(len(models), 0)
        for axes, view, title in zip(grid, (0, 1), ("clean", "robust"), strict=True):
            values = [pair[view] for pair in accuracies.values()]
            axes.pcolormesh(values, vmin=0, vmax=100, cmap="Blues", edgecolors="white")
            axes.set(title=f"{title} accuracy, %", xticks=[k + 0.5 for k in range(classes)])
            axes.set_xticklabels(class_names, rotation=90, fontsize=8 if classes <= _NUMBERED else 4)
            axes.set_yticks([i + 0.5 for i in range(len(models))], models)
            for i, row in enumerate(values if classes <= _NUMBERED else ()):
                for k, value in enumerate(row):
                    color = "white" if value > 60 else "black"
                    axes.text(k + 0.5, i + 0.5, f"{value:.0f}", ha="center", va="center", fontsize=6.5, color=color)
        figure.colorbar(grid[0].collections[0], ax=grid, shrink=0.8)
    return figure
