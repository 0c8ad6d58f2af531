"""Accuracy over the radius of the threat, from evaluations at several radii and from diagnoses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

import matplotlib as mpl
from matplotlib.figure import Figure

from advalign.attacks.names import parse_name
from advalign.report.figures import HOVER, MOST_NAMES, STYLE, color_of, curves_figure
from advalign.runs import Record
from advalign.threats import parse_threat

Curve = Mapping[float, tuple[float, int]]
"""Accuracy in [0, 1] and number of test images by radius; at 0 the clean accuracy."""


def radii_of(records: Sequence[Record]) -> tuple[str, Curve]:
    """Return an attack and one model's accuracy under it over the radius.

    Among the attacks that were run at the most radii it is the strongest. With one radius the curve is empty.
    """
    curves: dict[str, dict[float, tuple[float, int]]] = {}
    clean = {0.0: (record.accuracy, record.n) for record in records if record.attack == "clean"}  # noqa: B035 (a model has one)
    for record in records:
        if record.attack != "clean" and not parse_name(record.attack).of_transfer:
            eps = parse_threat(record.threat).eps
            curves.setdefault(record.attack, dict(clean))[eps] = (record.accuracy, record.n)

    def strength(item: tuple[str, Curve]) -> tuple[int, float]:
        return len(item[1]), -sum(share for share, _ in item[1].values())

    attack, curve = max(curves.items(), key=strength, default=("", clean))
    return attack, curve if len(curve) > 2 else {}


def radius_curves(curves: Mapping[str, Curve]) -> Figure:
    """Plot accuracy over the radius, a curve for each model, with one standard error of the binomial."""
    with mpl.rc_context(STYLE):
        named = len(curves) <= MOST_NAMES
        figure = curves_figure(9, max(4.0, 0.19 * len(curves) * named), named=named)
        axes = figure.add_subplot(xlabel="radius", ylabel="accuracy, %", ylim=(-2, 102))
        for i, (name, curve) in enumerate(curves.items()):
            radii = sorted(curve)
            shares = [curve[eps][0] for eps in radii]
            errors = [100 * sqrt(share * (1 - share) / curve[eps][1]) for eps, share in zip(radii, shares, strict=True)]
            percent = [100 * share for share in shares]
            axes.errorbar(radii, percent, errors, marker="o", markersize=4, color=color_of(i, len(curves)), label=name)
            axes.lines[-1].set_gid(HOVER + name)
        axes.set_xscale("symlog", linthresh=min(eps for curve in curves.values() for eps in curve if eps > 0))
        axes.set_xlim(left=0)
        if named:
            figure.legend(frameon=False, fontsize=7, loc="outside right upper")
    return figure
