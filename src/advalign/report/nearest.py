"""Accuracy at every radius at once, from the distances of the nearest adversaries that one attack has found."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

import matplotlib as mpl
from matplotlib.figure import Figure

from advalign.evaluation.accuracy import WORST_CASE
from advalign.evaluation.results import Measurement
from advalign.report.figures import HOVER, STYLE, curves_figure
from advalign.report.page import FigureSection
from advalign.threats import parse_threat

NORMS = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def nearest_sections(measured: Measurement) -> list[FigureSection]:
    """Return the figure of accuracy over the radius, if an attack has looked for the nearest adversaries."""
    if not measured.radii:
        return []
    caption = (
        "An image counts from the distance of its nearest adversary on, which the model in fp32 has misclassified: an "
        "upper bound at every radius. Dots: the median radius. Crosses: attacks within the threat model; one below the "
        "curve says that the curve's attack has missed images."
    )
    return [FigureSection("Accuracy at every radius", nearest_figure(measured), caption)]


def nearest_figure(measured: Measurement) -> Figure:
    """Plot the share of images whose nearest adversary is farther, and the attacks within the threat model."""
    threat = parse_threat(measured.records[0].threat)
    with mpl.rc_context(STYLE):
        figure = curves_figure(8, 4.5, named=True)
        axes = figure.add_subplot(xlabel=f"radius ({NORMS[threat.norm]} norm)", ylabel="accuracy, %", ylim=(-2, 102))
        for name, radii in measured.radii.items():
            steps = sorted(radius for radius in radii if radius < float("inf"))
            left = [100 * (len(radii) - k) / len(radii) for k in range(len(steps) + 1)]
            axes.step([0, *steps], left, where="post", label=name)
            axes.lines[-1].set_gid(HOVER + name)
            if (middle := median(radii)) < float("inf"):
                axes.plot([middle], [100 * accuracy_at(radii, middle)], "o", color=axes.lines[-1].get_color())
        for name, share in measured.evaluation.accuracies().items():
            if name not in ("clean", WORST_CASE) and name not in measured.evaluation.unbounded:
                axes.plot([threat.eps], [100 * share], "x", label=name)
                axes.lines[-1].set_gid(f"{HOVER}{name}: {100 * share:.1f} %")
        axes.set_xlim(left=0)
        axes.legend(frameon=False, fontsize=8)
    return figure


def nearest_remarks(measured: Measurement) -> Iterator[str]:
    """Yield, for each such attack, the median radius and the accuracy at the threat model's radius."""
    threat = parse_threat(measured.records[0].threat)
    for name, radii in measured.radii.items():
        middle = median(radii)
        found = (
            f"median radius {middle:.4g}" if middle < float("inf") else "no adversary of more than half of the images"
        )
        share = 100 * accuracy_at(radii, threat.eps)
        yield f"{name}: {found} in the {NORMS[threat.norm]} norm; accuracy at most {share:.1f} % at {threat}"


def accuracy_at(radii: list[float], eps: float) -> float:
    """Return the share of images whose nearest adversary is farther than a radius."""
    return sum(radius > eps for radius in radii) / len(radii)
