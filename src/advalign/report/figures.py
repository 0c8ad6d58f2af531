"""Figures: the trade-off between clean and robust accuracy, training curves, and a gallery of adversarial examples."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from math import nan, sqrt
from statistics import mean
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from torch import Tensor

from advalign.diagnosis import Diagnosis, Surfaces
from advalign.report.tables import rows_of, worst_cases
from advalign.runs import Record

_FEW = 10  # curves that a legend inside the axes, and matplotlib's colours, are enough for
_MARKERS = "osD^vP*X"
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def trade_off(records: Sequence[Record]) -> Figure:
    """Plot clean accuracy against the worst case over the most attacks, a point per row of the table.

    A point is the mean over the seeds of which both were measured. A family is a method without its arguments, in one
    setting: TRADES at several betas is one curve.
    """
    attack = worst_cases(records)[0]
    families: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows_of(records)[0]:
        clean, robust = row.accuracies("clean"), row.accuracies(attack)
        if not (seeds := clean.keys() & robust.keys()):
            continue
        family = ", ".join((re.sub(r"\([^()]*\)", "", row.method), *row.extras))
        arguments = ", ".join(re.findall(r"\(([^()]*)\)", row.method))
        families.setdefault(family, []).append(
            (mean(clean[seed] for seed in seeds), mean(robust[seed] for seed in seeds), arguments)
        )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(7, 4.6), layout="constrained")
        axes = figure.add_subplot(xlabel="clean accuracy, %", ylabel="robust accuracy (worst case), %")
        for i, (family, points) in enumerate(families.items()):
            x, y, _ = zip(*sorted(points), strict=True)
            axes.plot(x, y, marker=_MARKERS[i % len(_MARKERS)], label=family, linewidth=1, markersize=7)
            for clean, robust, arguments in points:
                label = arguments or ("default" if len(points) > 1 else "")
                axes.annotate(label, (clean, robust), textcoords="offset points", xytext=(6, 5), fontsize=7)
        axes.legend(frameon=False, fontsize=8)
        axes.set_title(f"{attack}, test images", fontsize=8, wrap=True)
    return figure


def training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Plot loss and validation accuracies over the epochs, a colour per run."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9 if len(logs) <= _FEW else 12, max(3.4, 0.17 * len(logs))), layout="constrained")
        left, right = figure.subplots(1, 2)
        for i, (name, log) in enumerate(logs.items()):
            color = _color(i, len(logs))
            left.plot([row["epoch"] for row in log], [row["loss"] for row in log], color=color, label=name)
            for key, style in (("clean", "--"), ("robust", "-")):
                rows = [row for row in log if key in row.get("validation", {})]
                shares = [100 * row["validation"][key] for row in rows]
                right.plot([row["epoch"] for row in rows], shares, style, color=color)
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        right.set(xlabel="epoch", ylabel="validation accuracy, %", title="dashed: clean, solid: PGD-10")
        if len(logs) <= _FEW:
            left.legend(frameon=False, fontsize=7)
        else:
            figure.legend(frameon=False, fontsize=6, loc="outside right upper")
    return figure


def _color(i: int, n: int) -> Any:
    """Return a colour of its own for each of n curves."""
    return f"C{i}" if n <= _FEW else mpl.colormaps["turbo"]((i + 0.5) / n)


def calibration_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Plot what VFD's log tells of each aligned layer: its two distances, and how strongly it pulls beside the labels.

    The band from .05 to .5 is where the method is neither idle nor in command; both axes are logarithmic in value.
    """
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        right.axhspan(0.05, 0.5, color="0.92")
        for i, (name, layer) in enumerate((n, k) for n, log in logs.items() for k in log[0]["calibration"]["vfd"]):
            rows = [(row["epoch"], row["calibration"]["vfd"][layer]) for row in logs[name]]
            epochs = [epoch for epoch, _ in rows]
            for view, style in (("clean", "--"), ("adv", "-")):
                left.plot(epochs, [told[f"distance_{view}"] for _, told in rows], style, color=f"C{i}")
            right.plot(epochs, [told.get("ratio", nan) for _, told in rows], color=f"C{i}", label=f"{name}, {layer}")
        left.set(xlabel="epoch", ylabel="distance of features", yscale="log", title="dashed: clean, solid: adversarial")
        right.set(xlabel="epoch", ylabel="gradient, VFD / labels", yscale="log", title="band: .05 to .5")
        right.legend(frameon=False, fontsize=7)
    return figure


def gallery(rows: Mapping[str, tuple[Tensor, Tensor, Sequence[str]]], amplify: float) -> Figure:
    """Show originals, adversarial examples and their amplified difference around grey, a band of three rows per model.

    Args:
        rows: model name to images (N, C, H, W) in [0, 1], adversarial images, and a caption for each.
        amplify: factor of the difference.
    """
    columns = len(next(iter(rows.values()))[2])
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.05 * columns + 1.6, 3.3 * len(rows)), layout="constrained")
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
                        axes.set_xlabel(caption, fontsize=7)
                grid[3 * band + k][0].set_ylabel(title, rotation=0, ha="right", va="center")
    return figure


def accuracy_curves(diagnosis: Diagnosis) -> Figure:
    """Plot accuracy over PGD's steps and over its radius, with one standard error of the binomial."""
    with mpl.rc_context(_STYLE):
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
