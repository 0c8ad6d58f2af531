"""A diagnosis as a table of verdicts and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from advalign.evaluation.diagnose import Diagnosis
from advalign.report.figures import accuracy_curves, loss_surfaces
from advalign.report.page import FigureSection, write_page
from advalign.report.tables import Table


def verdict_table(diagnosis: Diagnosis) -> Table:
    """Tabulate the verdicts, a row each."""
    caption = (
        f"{diagnosis.threat}; n = {diagnosis.n} test images; ± is one standard error of the binomial. "
        "A difference fails only where chance alone would give it less than once in a thousand times."
    )
    rows = tuple(
        (each.name, each.passed, str(each), f"{each.sentence} {each.advice}".strip()) for each in diagnosis.verdicts
    )
    return Table(("check", "verdict", "number", "what it says"), rows, frozenset(), caption, prose=True)


def verdicts_table(diagnoses: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate what the diagnoses of several models hold, a row a model, a column a check."""
    given = {
        model: {verdict["name"]: verdict["passed"] for verdict in diagnosis["verdicts"]}
        for model, diagnosis in diagnoses.items()
    }
    checks = list(dict.fromkeys(check for verdicts in given.values() for check in verdicts))
    rows = tuple((model, *(verdicts.get(check, "–") for check in checks)) for model, verdicts in given.items())
    many = sorted({diagnosis["n"] for diagnosis in diagnoses.values()})
    threats = sorted({diagnosis["threat"] for diagnosis in diagnoses.values()})
    caption = f"advalign diagnose; {', '.join(threats)}; n = {', '.join(map(str, many))} test images."
    return Table(("model", *checks), rows, frozenset(), caption, prose=True)


def remarks_table(diagnoses: Mapping[str, Mapping[str, Any]]) -> Table:
    """Tabulate the verdicts of several models that are no pass, with what they say."""
    rows = tuple(
        (model, verdict["name"], verdict["passed"], verdict["sentence"])
        for model, diagnosis in diagnoses.items()
        for verdict in diagnosis["verdicts"]
        if verdict["passed"] != "pass"
    )
    caption = f"{len(rows)} warnings and failures." if rows else "No warnings, no failures."
    return Table(("model", "check", "verdict", "what it says"), rows, frozenset(), caption, prose=True)


def summary(diagnosis: Diagnosis) -> str:
    """Say in a line how many failed."""
    warned = sum(verdict.passed == "warn" for verdict in diagnosis.verdicts)
    if diagnosis.failed:
        return f"Not to be trusted as it stands. Failed: {', '.join(diagnosis.failed)}; warnings: {warned}."
    return f"Nothing failed; warnings: {warned}. Accuracy under attack is still an upper bound."


def write_diagnosis(
    path: Path, title: str, introduction: Sequence[str], diagnosis: Diagnosis, environment: Mapping[str, str]
) -> None:
    """Write the page.

    Raises:
        UserError: the file cannot be written.
    """
    plates = []
    if diagnosis.by_steps:
        caption = "More steps and larger radii must not be weaker; at the largest radius hardly an image may withstand."
        plates.append(FigureSection("Accuracy over steps and over radius", accuracy_curves(diagnosis), caption))
    if diagnosis.surfaces is not None and len(diagnosis.surfaces.loss):
        caption = (
            "Cross entropy around images that are classified correctly, in radii from the image in the middle; the "
            "white line is where the class changes. Sound: a slope to the right. Masked: flat, or jagged."
        )
        plates.append(FigureSection("Loss surface", loss_surfaces(diagnosis.surfaces), caption))
    write_page(path, title, [summary(diagnosis), *introduction], verdict_table(diagnosis), plates, environment)
