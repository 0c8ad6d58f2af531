"""Figures of what an argument does: clean against robust accuracy as curves, and both along the argument."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure

_MARKERS = "osD^vP*X"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


class CurvePoint(NamedTuple):
    """A place on a curve: accuracies in per cent, a value a seed."""

    at: float | str
    clean: tuple[float, ...]
    robust: tuple[float, ...]


def trade_off_curves(curves: Mapping[str, Sequence[CurvePoint]], robust: str) -> Figure:
    """Plot clean against robust accuracy, a mean over seeds with its standard deviation for each point.

    Points are joined where they lie along a number.

    Args:
        robust: what the robust accuracy is.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot(xlabel="clean accuracy, %", ylabel=f"accuracy under {robust}, %")
        for i, (name, points) in enumerate(curves.items()):
            x, y = [mean(point.clean) for point in points], [mean(point.robust) for point in points]
            joined = all(isinstance(point.at, float | int) for point in points)
            wide, high = _spreads([point.clean for point in points]), _spreads([point.robust for point in points])
            style = _MARKERS[i % len(_MARKERS)] + ("-" if joined else "")
            axes.errorbar(x, y, xerr=wide, yerr=high, fmt=style, label=name, linewidth=1, capsize=2)
            for point, clean, withstood in zip(points, x, y, strict=True):
                axes.annotate(
                    _label(point.at), (clean, withstood), textcoords="offset points", xytext=(6, 5), fontsize=7
                )
        axes.legend(frameon=False, fontsize=8)
    return figure


def sweep_curves(curves: Mapping[str, Sequence[CurvePoint]], along: str, robust: str) -> Figure:
    """Plot clean and robust accuracy along an argument, which is a number or a list of names.

    Args:
        along: the argument's name.
        robust: what the robust accuracy is.
    """
    places = list(dict.fromkeys(point.at for points in curves.values() for point in points))
    named = any(isinstance(place, str) for place in places)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, what in ((left, "clean"), (right, "robust")):
            for i, (name, points) in enumerate(curves.items()):
                values = [getattr(point, what) for point in points]
                x = [float(places.index(point.at)) if named else float(point.at) for point in points]
                axes.errorbar(
                    x, list(map(mean, values)), yerr=_spreads(values), label=name, linewidth=1, capsize=3,
                    marker=_MARKERS[i % len(_MARKERS)],
                )  # fmt: skip
            axes.set_xlabel(along)
            marks = [place if isinstance(place, float | int) and not named else i for i, place in enumerate(places)]
            axes.set_xticks(marks, labels=list(map(_label, places)))
        left.set_ylabel("clean accuracy, %")
        right.set_ylabel(f"accuracy under {robust}, %")
        if len(curves) > 1:
            left.legend(frameon=False, fontsize=8)
    return figure


def _spreads(points: Sequence[Sequence[float]]) -> list[float] | None:
    """Return each point's standard deviation over seeds; no bars at all where there is one seed."""
    if all(len(values) == 1 for values in points):
        return None
    return [stdev(values) if len(values) > 1 else 0.0 for values in points]


def _label(at: float | str) -> str:
    return at if isinstance(at, str) else f"{at:g}"
