"""The trade-off between clean and robust accuracy: a point for each row of the table, and the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from advalign.attacks.names import parse_name, worst_cases_among
from advalign.errors import UserError
from advalign.frontier.result import StoredFrontier
from advalign.report.figures import FEW_CURVES, HOVER, MARKERS, MOST_NAMES, STYLE, color_of, curves_figure
from advalign.report.frontier import curve_attacks, draw_curve, frontier_name
from advalign.report.rows import Flags, group_rows
from advalign.runs import Record
from advalign.spelling import parse_calls, spell_arguments

_SPAN = 4  # points that an axis shows at least: less looks like a difference


class TradeOffPoint(NamedTuple):
    """A row of the table as a point of the plot; accuracies and standard deviations in per cent."""

    clean: float
    robust: float
    clean_spread: float
    robust_spread: float
    seeds: int
    name: str
    arguments: str

    def __str__(self) -> str:
        many = self.seeds > 1
        clean, robust = (
            f"{value:.1f}" + (f" ± {spread:.1f}" if many else "")
            for value, spread in ((self.clean, self.clean_spread), (self.robust, self.robust_spread))
        )
        return f"{self.name}: clean {clean} %, robust {robust} %, {self.seeds} seed{'s' if many else ''}"


Families = dict[str, list[TradeOffPoint]]


def trade_off_figure(
    records: Sequence[Record],
    attack: str | None = None,
    flags: Flags | None = None,
    frontiers: Sequence[StoredFrontier] = (),
) -> Figure:
    """Plot clean against robust accuracy, a point for each row of the table, and the Pareto front.

    A point is the mean over the seeds of which both were measured, with their standard deviations. A family is a method
    without its arguments, in one setting: TRADES at several betas is one curve.

    Args:
        attack: the attack of the robust accuracy; the worst case over the most attacks if None.
        frontiers: curves on the same images, under the attacks of their own.
    """
    attack = attack or worst_cases_among(record.attack for record in records)[0]
    families = _families(records, attack, flags)
    every = [point for points in families.values() for point in points]
    with mpl.rc_context(STYLE):
        figure = curves_figure(7, 4.6, named=len(families) + len(frontiers) <= MOST_NAMES)
        axes = figure.add_subplot(xlabel="clean accuracy, %", ylabel=f"robust accuracy ({_short(attack)}), %")
        _draw_families(axes, families)
        for i, stored in enumerate(frontiers):
            color = color_of(len(families) + i, len(families) + len(frontiers))
            draw_curve(axes, stored, color, frontier_name(stored), band=False)
        front = pareto([(point.clean, point.robust) for point in every])
        if len(front) > 1:
            axes.plot(*zip(*front, strict=True), ":", color="0.4", linewidth=1.2, label="Pareto front", zorder=1)
        for side in (axes.xaxis, axes.yaxis):
            low, high = side.get_view_interval()
            if high - low < _SPAN:
                middle = (low + high) / 2
                side.set_view_interval(middle - _SPAN / 2, middle + _SPAN / 2, ignore=True)
        for point in every:
            axes.plot(point.clean, point.robust, "o", markersize=16, alpha=0, gid=HOVER + str(point))
        few = len(families) <= FEW_CURVES and len(every) <= MOST_NAMES and not frontiers
        legend = {"frameon": False, "fontsize": 8 if few else 6}
        if few:
            axes.legend(**legend)
        elif len(families) + len(frontiers) <= MOST_NAMES:
            figure.set_size_inches(10, max(4.6, 0.17 * len(families)))
            figure.legend(**legend, loc="outside right upper")
        curves = (f"{frontier_name(stored)}: {curve_attacks(stored)}" for stored in frontiers)
        axes.set_title("\n".join((f"{attack}, test images", *curves)), fontsize=8, wrap=True)
    return figure


def _families(records: Sequence[Record], attack: str, flags: Flags | None) -> Families:
    families: Families = {}
    for row in group_rows(records, flags)[0]:
        clean, robust = row.accuracies("clean"), row.accuracies(attack)
        if seeds := clean.keys() & robust.keys():
            method, arguments = _split_arguments(row.method)
            family = ", ".join((method, *row.traits))
            x, y = [clean[seed] for seed in seeds], [robust[seed] for seed in seeds]
            name = ", ".join((row.method, *row.traits))
            point = TradeOffPoint(mean(x), mean(y), _spread(x), _spread(y), len(seeds), name, arguments)
            families.setdefault(family, []).append(point)
    return {family: sorted(points) for family, points in families.items()}


def _split_arguments(method: str) -> tuple[str, str]:
    """Return a method without its arguments, and these; the file name of weights from elsewhere stays whole."""
    try:
        calls = parse_calls(method)
    except UserError:
        return method, ""
    arguments = [spell_arguments(call.arguments) for call in calls if call.arguments]
    return ("+".join(call.name for call in calls), ", ".join(arguments)) if arguments else (method, "")


def _draw_families(axes: Axes, families: Families) -> None:
    named = sum(map(len, families.values())) <= MOST_NAMES
    for i, (family, points) in enumerate(families.items()):
        x, y = [point.clean for point in points], [point.robust for point in points]
        color, marker = color_of(i, len(families)), MARKERS[i % len(MARKERS)]
        axes.plot(x, y, color=color, marker=marker, label=family, linewidth=1, markersize=7)
        for point in points:
            center = (point.clean, point.robust)
            if named:
                label = point.arguments or ("default" if len(points) > 1 else "")
                axes.annotate(label, center, textcoords="offset points", xytext=(6, 5), fontsize=7)
            if point.seeds > 1:
                axes.errorbar(*center, point.robust_spread, point.clean_spread, fmt="none", ecolor=color, elinewidth=1)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other point dominates, from left to right; of equal points one."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):  # from the right; of one x the highest first
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def _short(attack: str) -> str:
    if not (name := parse_name(attack)).is_worst_case:
        return attack
    return "worst case" if len(name.members) > 1 else "".join(name.members)
