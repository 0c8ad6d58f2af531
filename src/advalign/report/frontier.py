"""A frontier as tables, as a figure, and as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from advalign.attacks.spelled import remarks_on
from advalign.evaluation.interval import wilson
from advalign.frontier.result import StoredFrontier
from advalign.frontier.trace import Curve, Point
from advalign.report import page
from advalign.report.commands import members_of, repeat_frontier
from advalign.report.figures import HOVER, STYLE
from advalign.report.frontier_words import alarms, by_source, only_elsewhere, percent, summary
from advalign.report.page import FigureSection, TableSection, TextSection
from advalign.report.tables import Table


def frontier_name(stored: StoredFrontier) -> str:
    """Name a frontier by its way and the networks that it was made from."""
    return f"{stored.content['method']}({', '.join(each['method'] for each in members_of(stored.content).values())})"


def curve_attacks(stored: StoredFrontier) -> str:
    """Say in short how the settings were attacked."""
    content = stored.content
    ends = f", {', '.join(content['attacks'])} on the chosen one and the robust network" if content["attacks"] else ""
    return f"{content['curve_attack']} on every setting{ends}, examples shown to all"


def curve_table(stored: StoredFrontier) -> Table:
    """Tabulate the settings on the test images, from the accurate network to the robust one, the chosen one bold."""
    return _settings_table(stored, {"clean": "clean", "robust": "robust", "floor": "floor"}, held_out=False)


def _settings_table(stored: StoredFrontier, headings: dict[str, str], *, held_out: bool) -> Table:
    rows = []
    for test, other in zip(stored.test.points, stored.held_out.points, strict=True):
        cells = [(test.clean, test.robust, test.floor), (other.clean, other.robust, other.floor)][: 1 + held_out]
        rows.append((str(test.setting), *(_cell(right) for of_images in cells for right in of_images)))
    columns = ("setting", *headings.values())
    best = frozenset((stored.chosen, column) for column in range(len(columns)))
    return Table(columns, tuple(rows), best, _caption(stored))


def _cell(right: Tensor | None) -> str:
    return "–" if right is None else f"{percent(right):.1f}"


def _caption(stored: StoredFrontier) -> str:
    content = stored.content
    reach = max(sum(_reach(right)) / 2 for point in stored.test.points for right in (point.clean, point.robust))
    floor = "; floor: whatever the accurate network does" if stored.test.points[0].floor is not None else ""
    return (
        f"Accuracy in % on {stored.test.images} test images of {content['data']}, {content['threat']}; 95 % intervals "
        f"reach ± {reach:.1f} points at most. Robust: under the examples made on every setting and on both networks"
        f"{floor}. Bold: chosen on {content['images_held_out']}."
        + "".join(f" {name}: {remark}." for name, remark in remarks_on([content["curve_attack"]]).items())
    )


def _reach(right: Tensor) -> tuple[float, float]:
    """Return how far the 95 % interval of a share (Wilson's) reaches below it and above it, in points."""
    (low, high), share = wilson(int(right.sum()), len(right)), percent(right)
    return max(share - 100 * low, 0.0), max(100 * high - share, 0.0)


def attack_table(stored: StoredFrontier) -> Table:
    """Tabulate what is left of each setting's clean accuracy after the examples made on each kind of network."""
    curve, content = stored.test, stored.content
    made_on = ("own attack", "robust network", "accurate network", "other settings")
    columns = ("setting", "clean", *made_on, "all", "only elsewhere")
    rows = []
    for point in curve.points:
        left = by_source(point, curve)
        shown = (point.clean, *left, point.robust, only_elsewhere(point, curve))
        rows.append((str(point.setting), *map(_cell, shown)))
    caption = (
        "In %: what is still right after the examples made on the setting itself, on the robust and the accurate "
        f"network, and on other settings, each alone, and after all of them. Every setting: {content['curve_attack']}; "
        f"the chosen one and the robust network: {', '.join(content['attacks']) or 'nothing further'}; the robust "
        "network to its least margin, the accurate one by its margin. Only elsewhere: withstands the own attack, and "
        "not the other examples."
    )
    return Table(columns, tuple(rows), frozenset((stored.chosen, column) for column in range(len(columns))), caption)


def write_page(stored: StoredFrontier) -> Path:
    """Write the page, beside the file; return its path.

    Raises:
        UserError: it cannot be written.
    """
    content, path = stored.content, stored.file.with_suffix(".html")
    headings = {key: key for key in ("clean", "robust", "floor")}
    headings |= {f"{key}, held out": f"{key}, held out" for key in headings}
    rule = (
        f"The rule: {content['rule']}. It was applied on {content['images_held_out']}; the test images only measure "
        "what was chosen."
    )
    sections = [
        FigureSection("Clean against robust accuracy", frontier_figure(stored), _figure_caption(stored)),
        TableSection("The settings", _settings_table(stored, headings, held_out=True)),
        TableSection("How much each attack took", attack_table(stored)),
    ]
    if content.get("run"):  # of networks in memory no command could repeat it
        repeated = {f"run {content['run']}": repeat_frontier(content, {})}
        sections.append(TextSection("The command that repeats it", repeated))
    introduction = [*summary(stored), *alarms(stored), *content.get("warnings", ()), rule]
    introduction += filter(None, [content.get("note", "")])
    page.write_page(path, f"Frontier: {frontier_name(stored)}", introduction, None, sections, content["environment"])
    return path


def _figure_caption(stored: StoredFrontier) -> str:
    band = ""
    if stored.test.points[0].floor is not None:
        band = " Dashed: the floor, which holds whatever the accurate network does; what lies between is measured only."
    return (
        f"Up and to the right is better. The curve: {stored.test.images} test images, with 95 % intervals; the star is "
        f"the chosen setting.{band} Faint: the same settings on the images they were chosen on, "
        f"{stored.content['images_held_out']}. Point at a mark for its numbers."
    )


def frontier_figure(stored: StoredFrontier) -> Figure:
    """Plot clean against robust accuracy over the settings, with the floor and the chosen setting."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot(xlabel="clean accuracy, %", ylabel="robust accuracy, %")
        _draw(axes, stored.held_out, color="0.75", label=f"{stored.held_out.images} held-out images", linewidth=1)
        draw_curve(axes, stored, "C0", f"{stored.test.images} test images", band=True)
        for point in (stored.test.points[0], stored.test.points[-1]):
            at = (percent(point.clean), percent(point.robust))
            name = "accurate network" if point is stored.test.points[0] else "robust network"
            axes.annotate(name, at, textcoords="offset points", xytext=(-6, 8), fontsize=8, ha="right")
        axes.set_ylim(bottom=min(-2, axes.get_ylim()[0]))
        axes.legend(frameon=False, fontsize=8)
    return figure


def draw_curve(axes: Axes, stored: StoredFrontier, color: str, label: str, *, band: bool) -> None:
    """Draw a frontier on the test images, its chosen setting as a star.

    Args:
        band: whether to draw the floor, and intervals.
    """
    points = stored.test.points
    x, y = _coordinates(points)
    if band and all(point.floor is not None for point in points):
        floors = [percent(point.floor) for point in points if point.floor is not None]
        axes.fill_between(x, floors, y, color=color, alpha=0.15, linewidth=0)
        axes.plot(x, floors, "--", color=color, linewidth=1, label="floor")
    if band:
        below_above = [[_reach(getattr(point, name)) for point in points] for name in ("robust", "clean")]
        robust, clean = ([list(side) for side in zip(*each, strict=True)] for each in below_above)
        axes.errorbar(x, y, robust, clean, fmt="none", ecolor=color, elinewidth=0.8, alpha=0.6)
    _draw(axes, stored.test, color=color, label=label, linewidth=1.5)
    chosen = f"chosen: {points[stored.chosen].setting}"
    axes.plot(x[stored.chosen], y[stored.chosen], "*", color=color, markersize=15, label=chosen)


def _draw(axes: Axes, curve: Curve, *, color: str, label: str, linewidth: float) -> None:
    x, y = _coordinates(curve.points)
    axes.plot(x, y, marker="o", markersize=4, color=color, label=label, linewidth=linewidth)
    for point, *at in zip(curve.points, x, y, strict=True):
        text = f"{point.setting}, {label}: clean {at[0]:.1f} %, robust {at[1]:.1f} %"
        axes.plot(*at, "o", markersize=14, alpha=0, gid=HOVER + text)


def _coordinates(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [percent(point.clean) for point in points], [percent(point.robust) for point in points]
