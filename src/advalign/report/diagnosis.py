"""A diagnosis as a table of verdicts and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from advalign.evaluation.diagnose import Diagnosis, Surfaces
from advalign.evaluation.diagnose_source import WrittenDiagnosis
from advalign.report.figures import STYLE
from advalign.report.page import FigureSection, write_page
from advalign.report.tables import Table
from advalign.runtime.environment import environment


def verdict_table(diagnosis: Diagnosis) -> Table:
    """Tabulate the verdicts of one model, a row for each check."""
    caption = (
        f"{diagnosis.threat}; n = {diagnosis.n} test images; ± is one standard error of the binomial. "
        "A difference fails only if chance alone would give it less than once in a thousand times."
    )
    rows = tuple(
        (each.name, each.passed, str(each), f"{each.sentence} {each.advice}".strip()) for each in diagnosis.verdicts
    )
    return Table(("check", "verdict", "number", "what it says"), rows, frozenset(), caption, prose=True)


def verdicts_table(diagnoses: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate the verdicts of several models, a row for each model, a column for each check."""
    verdicts_of = {
        model: {verdict["name"]: verdict["passed"] for verdict in diagnosis["verdicts"]}
        for model, diagnosis in diagnoses.items()
    }
    checks = list(dict.fromkeys(check for verdicts in verdicts_of.values() for check in verdicts))
    rows = tuple((model, *(verdicts.get(check, "–") for check in checks)) for model, verdicts in verdicts_of.items())
    many = sorted({diagnosis["n"] for diagnosis in diagnoses.values()})
    threats = sorted({diagnosis["threat"] for diagnosis in diagnoses.values()})
    caption = f"advalign diagnose; {', '.join(threats)}; n = {', '.join(map(str, many))} test images."
    return Table(("model", *checks), rows, frozenset(), caption, prose=True)


def remarks_table(diagnoses: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate the warnings and failures of several models, with their explanations."""
    rows = tuple(
        (model, verdict["name"], verdict["passed"], verdict["sentence"])
        for model, diagnosis in diagnoses.items()
        for verdict in diagnosis["verdicts"]
        if verdict["passed"] != "pass"
    )
    caption = f"{len(rows)} warnings and failures." if rows else "No warnings, no failures."
    return Table(("model", "check", "verdict", "what it says"), rows, frozenset(), caption, prose=True)


def summary(diagnosis: Diagnosis) -> str:
    """Return a line on how many checks failed or warn."""
    warned = sum(verdict.passed == "warn" for verdict in diagnosis.verdicts)
    if diagnosis.failed:
        return f"Not to be trusted as it stands. Failed: {', '.join(diagnosis.failed)}; warnings: {warned}."
    return f"Nothing failed; warnings: {warned}. Accuracy under attack is still an upper bound."


def write_diagnosis(written: WrittenDiagnosis, source: str) -> None:
    """Write the page of a diagnosis, beside its JSON.

    Args:
        source: what was diagnosed, as the user named it.

    Raises:
        UserError: the file cannot be written.
    """
    diagnosis, dataset, sections = written.diagnosis, written.target.dataset, []
    about = f"{written.target.model} on {dataset.name}."
    introduction = [summary(diagnosis), about, *filter(None, [written.target.note])]
    if diagnosis.by_steps:
        caption = (
            "More steps and larger radii must not be weaker; at the largest radius hardly any image may withstand."
        )
        sections.append(FigureSection("Accuracy over steps and over radius", accuracy_curves(diagnosis), caption))
    if diagnosis.surfaces is not None and len(diagnosis.surfaces.loss):
        caption = (
            "Cross entropy around correctly classified images, in radii from the image in the middle; the "
            "white line is the decision boundary. Sound: a slope to the right. Masked gradients: flat, or jagged."
        )
        sections.append(FigureSection("Loss surface", loss_surfaces(diagnosis.surfaces), caption))
    page, table = written.path.with_suffix(".html"), verdict_table(diagnosis)
    write_page(page, f"Diagnosis of {source}", introduction, table, sections, environment())


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
    """Draw cross entropy around each image; the white line is the decision boundary."""
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
