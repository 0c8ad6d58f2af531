"""Figures: the trade-off between clean and robust accuracy, training curves, and a gallery of adversarial examples.

An artist whose gid begins with `HOVER` shows what follows when the pointer is on it, in the SVG of `report.svg`.
"""

from __future__ import annotations

import base64
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from math import nan, sqrt
from statistics import mean, stdev
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from advalign.attacks.names import parse_name, worst_cases_among
from advalign.evaluation.diagnose import Diagnosis, Surfaces
from advalign.report.tables import Flags, rows_of
from advalign.runs import Record

HOVER = "hover: "
_SPAN = 4  # points that an axis of the trade-off shows at least: less looks like a difference
_FEW = 10  # curves that a legend inside the axes, and matplotlib's colours, are enough for
_CAPTION = 20  # letters of a caption that an image of the gallery is as wide as
_MARKERS = "osD^vP*X"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def trade_off(records: Sequence[Record], attack: str | None = None, flags: Flags | None = None) -> Figure:
    """Plot clean against robust accuracy, a point per row of the table, and the points that no other one beats.

    A point is the mean over the seeds of which both were measured, with their standard deviations. A family is a method
    without its arguments, in one setting: TRADES at several betas is one curve.

    Args:
        attack: of the robust accuracy; the worst case over the most attacks if not given.
    """
    attack = attack or worst_cases_among(record.attack for record in records)[0]
    families: dict[str, list[TradeOffPoint]] = {}
    for row in rows_of(records, flags)[0]:
        clean, robust = row.accuracies("clean"), row.accuracies(attack)
        if seeds := clean.keys() & robust.keys():
            family = ", ".join((re.sub(r"\([^()]*\)", "", row.method), *row.traits))
            arguments = ", ".join(re.findall(r"\(([^()]*)\)", row.method))
            x, y = [clean[seed] for seed in seeds], [robust[seed] for seed in seeds]
            name = ", ".join((row.method, *row.traits))
            point = TradeOffPoint(mean(x), mean(y), _spread(x), _spread(y), len(seeds), name, arguments)
            families.setdefault(family, []).append(point)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot(xlabel="clean accuracy, %", ylabel=f"robust accuracy ({_short(attack)}), %")
        for i, (family, points) in enumerate(families.items()):
            points.sort()
            x, y = [point.clean for point in points], [point.robust for point in points]
            color, marker = color_of(i, len(families)), _MARKERS[i % len(_MARKERS)]
            axes.plot(x, y, color=color, marker=marker, label=family, linewidth=1, markersize=7)
            for point in points:
                label = point.arguments or ("default" if len(points) > 1 else "")
                at = (point.clean, point.robust)
                axes.annotate(label, at, textcoords="offset points", xytext=(6, 5), fontsize=7)
                axes.errorbar(*at, point.robust_spread, point.clean_spread, fmt="none", ecolor=color, elinewidth=1)
        every = [point for points in families.values() for point in points]
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
        legend = {"frameon": False, "fontsize": 8 if len(families) <= _FEW else 6}
        if len(families) <= _FEW:
            axes.legend(**legend)
        else:
            figure.set_size_inches(10, max(4.6, 0.17 * len(families)))
            figure.legend(**legend, loc="outside right upper")
        axes.set_title(f"{attack}, test images", fontsize=8, wrap=True)
    return figure


class TradeOffPoint(NamedTuple):
    """A row of the table in the plot of the trade-off; accuracies and standard deviations in per cent."""

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


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other one equals or beats in both coordinates, and beats in one, from left to right."""
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


def training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Plot loss and validation accuracies over the epochs, a colour per run."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9 if len(logs) <= _FEW else 12, max(3.4, 0.17 * len(logs))), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, (name, log) in enumerate(logs.items()):
            color = color_of(i, len(logs))
            told = {"color": color, "gid": HOVER + name}
            left.plot([row["epoch"] for row in log], [row["loss"] for row in log], label=name, **told)
            for key, style in (("clean", "--"), ("robust", "-")):
                rows = [row for row in log if key in row.get("validation", {})]
                shares = [100 * row["validation"][key] for row in rows]
                right.plot([row["epoch"] for row in rows], shares, style, **told)
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        right.set(xlabel="epoch", ylabel="validation accuracy, %", title="dashed: clean, solid: PGD-10")
        if len(logs) <= _FEW:
            left.legend(frameon=False, fontsize=7)
        else:
            figure.legend(frameon=False, fontsize=6, loc="outside right upper")
    return figure


def color_of(i: int, n: int) -> Any:
    """Return a colour of its own for each of n curves."""
    return f"C{i}" if n <= _FEW else mpl.colormaps["turbo"]((i + 0.5) / n)


def calibration_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Plot what VFD's log tells of each aligned layer: its two distances, and how strongly it pulls beside the labels.

    The band from .05 to .5 is where the method is neither idle nor in command; both axes are logarithmic in value.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        right.axhspan(0.05, 0.5, color="0.92")
        told_of = [(n, k) for n, log in logs.items() for k in log[0]["calibration"]["vfd"]]
        for i, (name, layer) in enumerate(told_of):
            color = color_of(i, len(told_of))
            rows = [(row["epoch"], row["calibration"]["vfd"][layer]) for row in logs[name]]
            epochs = [epoch for epoch, _ in rows]
            for view, style in (("clean", "--"), ("adv", "-")):
                left.plot(epochs, [told[f"distance_{view}"] for _, told in rows], style, color=color)
            right.plot(epochs, [told.get("ratio", nan) for _, told in rows], color=color, label=f"{name}, {layer}")
        left.set(xlabel="epoch", ylabel="distance of features", yscale="log", title="dashed: clean, solid: adversarial")
        right.set(xlabel="epoch", ylabel="gradient, VFD / labels", yscale="log", title="band: .05 to .5")
        for axes in (left, right):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(frameon=False, fontsize=7, loc="outside lower center", ncols=3)
    return figure


GalleryRows = Mapping[str, tuple[Tensor, Tensor, Sequence[str]]]
"""By model, images (N, C, H, W) in [0, 1], adversarial images, and a caption of a few lines for each."""


def gallery(rows: GalleryRows, amplify: float) -> Figure:
    """Show originals, adversarial examples and their amplified difference around grey, a band of three rows per model.

    Args:
        amplify: factor of the difference.
    """
    columns = len(next(iter(rows.values()))[2])
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.05 * columns + 1.6, 3.6 * len(rows)), layout="constrained")
        grid = figure.subplots(3 * len(rows), columns, squeeze=False)
        for band, (name, (x, x_adv, captions)) in enumerate(rows.items()):
            difference = (0.5 + amplify * (x_adv - x)).clamp(0, 1)
            for k, (title, images) in enumerate(
                ((f"{name}\noriginal", x), ("adversarial", x_adv), (f"difference × {amplify:g}", difference))
            ):
                for axes, image, caption in zip(grid[3 * band + k], images, captions, strict=True):
                    shown = image.permute(1, 2, 0).squeeze(-1).numpy()
                    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                    axes.set(xticks=[], yticks=[])
                    if k == 1:
                        lines = [textwrap.fill(line, _CAPTION) for line in caption.split("\n")]
                        axes.set_xlabel("\n".join(lines), fontsize=7)
                grid[3 * band + k][0].set_ylabel(title, rotation=0, ha="right", va="center")
    return figure


def gallery_in_words(rows: GalleryRows) -> str:
    """Say of each image of the gallery what its caption says, for who does not see it."""
    return " ".join(
        f"{name}: {'; '.join(', '.join(caption.splitlines()) for caption in captions)}."
        for name, (_, _, captions) in rows.items()
    )


def accuracy_curves(diagnosis: Diagnosis) -> Figure:
    """Plot accuracy over PGD's steps and over its radius, with one standard error of the binomial."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, curve in ((left, diagnosis.by_steps), (right, diagnosis.by_radius)):
            errors = [100 * sqrt(share * (1 - share) / diagnosis.n) for share in curve.values()]
            axes.errorbar(list(curve), [100 * share for share in curve.values()], errors, marker="o", capsize=3)
            axes.set_ylim(-2, 102)
        left.set(xlabel="steps", ylabel="accuracy, %", xscale="log", title=f"PGD, {diagnosis.threat}")
        left.set_xticks(list(diagnosis.by_steps), labels=[str(steps) for steps in diagnosis.by_steps])
        left.minorticks_off()
        right.set_xscale("symlog", linthresh=min(eps for eps in diagnosis.by_radius if eps > 0))
        right.set(xlabel="radius", title="PGD-20")
        right.set_xticks(list(diagnosis.by_radius), labels=[f"{eps:.2g}" for eps in diagnosis.by_radius])
        right.minorticks_off()
        right.set_xlim(0, 1.1 * max(diagnosis.by_radius))
    return figure


def loss_surfaces(surfaces: Surfaces) -> Figure:
    """Draw cross entropy around each image; the white line is where the image leaves its class."""
    many = len(surfaces.loss)
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(2.3 * max(many, 1) + 0.7, 2.6), layout="constrained")
        grid = figure.subplots(1, max(many, 1), squeeze=False)[0]
        offsets = surfaces.offsets.numpy()
        for axes, loss, margin in zip(grid, surfaces.loss, surfaces.margin, strict=False):
            drawn = axes.pcolormesh(offsets, offsets, loss.T.numpy(), shading="nearest", rasterized=True)
            if bool((margin > 0).any() and (margin < 0).any()):
                axes.contour(offsets, offsets, margin.T.numpy(), levels=[0], colors="white", linewidths=1)
            axes.set(xlabel="along the gradient", aspect="equal")
            figure.colorbar(drawn, ax=axes, shrink=0.7)
        grid[0].set_ylabel("random direction")
    return figure


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """Return the figure as a PNG inside a URI, for a page that is one file."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()
