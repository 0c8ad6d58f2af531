"""Training logs as figures and tables: loss and validation accuracy, collapses, and the calibration of VFD."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import nan
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from advalign.report.figures import FEW_CURVES, HOVER, MOST_NAMES, STYLE, color_of, curves_figure
from advalign.report.page import FigureSection, TableSection
from advalign.report.tables import Table

Logs = Mapping[str, Sequence[Mapping[str, Any]]]
"""The log of each run, a mapping for each epoch, by the run's name."""


def training_section(logs: Logs) -> FigureSection:
    """Return the training curves of all runs."""
    return FigureSection("Training", training_curves(logs), "Loss on the training images, accuracy on held-out ones.")


def collapse_section(logs: Logs) -> TableSection | None:
    """Return what the guard against catastrophic overfitting has gone back for, or None if it watched no run."""
    watched = {name: log for name, log in logs.items() if any("guard" in row for row in log)}
    if not watched:
        return None
    rows = tuple(
        (name, f"{each['epoch']:.2f}", f"{100 * each['before']:.0f}", f"{100 * each['after']:.0f}",
         f"{each['back_to']:.2f}", f"PGD, {each['steps']:.0f} steps")
        for name, log in watched.items() for row in log for each in row.get("collapses", ())
    )  # fmt: skip
    caption = (
        f"The guard watched {len(watched)} of {len(logs)} runs, whose training attack is cheap, and saw "
        f"{len(rows) or 'no'} collapse{'s' * (len(rows) != 1)} of robust accuracy. Epochs done when it was noticed, "
        "accuracy in % under PGD-10 on validation images before and after, what was gone back to, and the attack since."
    )
    columns = ("method", "at epoch", "before", "after", "back to", "from there")
    return TableSection("Catastrophic overfitting", Table(columns, rows, frozenset(), caption))


def calibration_section(logs: Logs) -> FigureSection | None:
    """Return the calibration of the runs that were trained with VFD, or None if there are none."""
    calibrated = {name: log for name, log in logs.items() if "vfd" in log[0].get("calibration", {})}
    if not calibrated:
        return None
    caption = (
        "Distance of the student's features to the vanilla model's, and VFD's gradient at those features relative to "
        "that of the terms that teach labels, on the first batch of each epoch."
    )
    return FigureSection("Calibration of VFD", calibration_curves(calibrated), caption)


def training_curves(logs: Logs) -> Figure:
    """Plot loss and validation accuracies over the epochs, a colour per run."""
    with mpl.rc_context(STYLE):
        named = len(logs) <= MOST_NAMES
        width, height = 9 if len(logs) <= FEW_CURVES or not named else 12, 0.17 * len(logs) * named
        figure = curves_figure(width, max(3.4, height), named=named)
        left, right = figure.subplots(1, 2)
        for i, (name, log) in enumerate(logs.items()):
            color = color_of(i, len(logs))
            line = {"color": color, "gid": HOVER + name}
            left.plot([row["epoch"] for row in log], [row["loss"] for row in log], label=name, **line)
            for key, style in (("clean", "--"), ("robust", "-")):
                rows = [row for row in log if key in row.get("validation", {})]
                shares = [100 * row["validation"][key] for row in rows]
                right.plot([row["epoch"] for row in rows], shares, style, **line)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        right.set(xlabel="epoch", ylabel="validation accuracy, %", title="dashed: clean, solid: PGD-10")
        if len(logs) <= FEW_CURVES:
            left.legend(frameon=False, fontsize=7)
        elif named:
            figure.legend(frameon=False, fontsize=6, loc="outside right upper")
    return figure


def calibration_curves(logs: Logs) -> Figure:
    """Plot what the log holds of each layer that VFD aligns: distances of features, and the ratio of gradients.

    In the band from 0.05 to 0.5 the method neither idles nor dominates; both plots have a logarithmic y axis.
    """
    with mpl.rc_context(STYLE):
        layers = [(name, layer) for name, log in logs.items() for layer in log[0]["calibration"]["vfd"]]
        named = len(layers) <= MOST_NAMES
        figure = curves_figure(9, 3.4, named=named)
        left, right = figure.subplots(1, 2)
        right.axhspan(0.05, 0.5, color="0.92")
        for i, (name, layer) in enumerate(layers):
            label = f"{name}, {layer}"
            line = {"color": color_of(i, len(layers)), "gid": None if named else HOVER + label}
            rows = [(row["epoch"], row["calibration"]["vfd"][layer]) for row in logs[name]]
            epochs = [epoch for epoch, _ in rows]
            for view, style in (("clean", "--"), ("adv", "-")):
                left.plot(epochs, [values[f"distance_{view}"] for _, values in rows], style, **line)
            right.plot(epochs, [values.get("ratio", nan) for _, values in rows], label=label, **line)
        left.set(xlabel="epoch", ylabel="distance of features", yscale="log", title="dashed: clean, solid: adversarial")
        right.set(xlabel="epoch", ylabel="gradient, VFD / labels", yscale="log", title="band: .05 to .5")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if named:
            figure.legend(frameon=False, fontsize=7, loc="outside lower center", ncols=3)
    return figure
