"""The effect of an argument as figures: clean against robust accuracy as curves, and both along the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

from advalign.report.figures import MARKERS, STYLE


class CurvePoint(NamedTuple):
    """A point on a curve: accuracies in per cent, a value for each seed."""

    at: float | str
    """The argument's value, a number or a name."""
    clean: tuple[float, ...]
    robust: tuple[float, ...]


def trade_off_curves(curves: Mapping[str, Sequence[CurvePoint]], robust: str) -> Figure:
    """Plot clean against robust accuracy, a mean over seeds with its standard deviation for each point.

    Points are joined where the argument is a number.

    Args:
        robust: name of the robust accuracy.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot(xlabel="clean accuracy, %", ylabel=f"accuracy under {robust}, %")
        for i, (name, points) in enumerate(curves.items()):
            x, y = [mean(point.clean) for point in points], [mean(point.robust) for point in points]
            joined = all(isinstance(point.at, float | int) for point in points)
            wide, high = _spreads([point.clean for point in points]), _spreads([point.robust for point in points])
            style = MARKERS[i % len(MARKERS)] + ("-" if joined else "")
            axes.errorbar(x, y, xerr=wide, yerr=high, fmt=style, label=name, linewidth=1, capsize=2)
            for point, clean, withstood in zip(points, x, y, strict=True):
                axes.annotate(
                    _label(point.at), (clean, withstood), textcoords="offset points", xytext=(6, 5), fontsize=7
                )
        axes.legend(frameon=False, fontsize=8)
    return figure


def sweep_curves(curves: Mapping[str, Sequence[CurvePoint]], along: str, robust: str) -> Figure:
    """Plot clean and robust accuracy along an argument, whose values are numbers or names.

    Args:
        along: name of the argument.
        robust: name of the robust accuracy.
    """
    positions = list(dict.fromkeys(point.at for points in curves.values() for point in points))
    named = any(isinstance(position, str) for position in positions)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, accuracy in ((left, "clean"), (right, "robust")):
            for i, (name, points) in enumerate(curves.items()):
                values = [getattr(point, accuracy) for point in points]
                x = [float(positions.index(point.at)) if named else float(point.at) for point in points]
                axes.errorbar(
                    x, list(map(mean, values)), yerr=_spreads(values), label=name, linewidth=1, capsize=3,
                    marker=MARKERS[i % len(MARKERS)],
                )  # fmt: skip
            axes.set_xlabel(along)
            ticks = [p if isinstance(p, float | int) and not named else i for i, p in enumerate(positions)]
            axes.set_xticks(ticks, labels=list(map(_label, positions)))
        left.set_ylabel("clean accuracy, %")
        right.set_ylabel(f"accuracy under {robust}, %")
        if len(curves) > 1:
            left.legend(frameon=False, fontsize=8)
    return figure


def _spreads(points: Sequence[Sequence[float]]) -> list[float] | None:
    """Return each point's standard deviation over seeds; None, for no bars, where each has one seed."""
    if all(len(values) == 1 for values in points):
        return None
    return [stdev(values) if len(values) > 1 else 0.0 for values in points]


def _label(position: float | str) -> str:
    return position if isinstance(position, str) else f"{position:g}"
