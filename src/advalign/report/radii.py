"""One model at several radii, by one command: a table, a curve, and images that only a smaller radius breaks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from advalign.evaluation.accuracy import WORST_CASE
from advalign.evaluation.results import Measurement
from advalign.report.page import FigureSection, write_page
from advalign.report.radius import Curve, radius_curves
from advalign.report.tables import Table, accuracy_table
from advalign.runtime.environment import environment
from advalign.runtime.files import digest
from advalign.threats import Threat, parse_threat


def radii_table(measurements: Sequence[Measurement]) -> Table:
    """Tabulate the accuracies of all radii, a row for each; no row is the best, since they are one model's."""
    table = accuracy_table([record for measured in measurements for record in measured.records])
    caption = table.caption.partition("; bold:")[0].removesuffix(".") + "."
    return replace(table, best=frozenset(), faint=frozenset(), caption=caption)


def radius_remarks(measurements: Sequence[Measurement]) -> Iterator[str]:
    """Yield how many images withstand at a radius though a smaller one breaks them, which a perfect attack forbids."""
    for smaller, larger in pairwise(measurements):
        for name, flags in larger.evaluation.correct.items():
            before = smaller.evaluation.correct.get(name)
            if name == "clean" or before is None or len(before) != len(flags):
                continue
            if missed := int((flags & ~before).sum()):
                radii = f"{_threat(larger)} though {_threat(smaller)} breaks them"
                yield f"{name}: {missed} of {len(flags)} images withstand at {radii}: what is left is an upper bound"


def write_radii(measurements: Sequence[Measurement], source: str) -> Path:
    """Write a page with the table and the curve, each also as files beside it; return its path.

    Raises:
        UserError: a file cannot be written.
    """
    first = measurements[0].path
    name = digest(repr([measured.path.name for measured in measurements]), digits=8)
    page = first.with_name(f"{first.stem.rpartition('-')[0]}-radii-{name}.html")
    table = radii_table(measurements)
    caption = "Bars: one standard error of the binomial. The radius at 0 is clean accuracy."
    section = FigureSection("Accuracy over the radius", radius_curves(curves_of(measurements)), caption)
    parts = page.with_name(f"{page.stem}-files")
    notes = [measurements[0].note, *radius_remarks(measurements)]
    write_page(
        page, f"Evaluation of {source} at {len(measurements)} radii", list(filter(None, notes)), table, [section],
        environment(), parts=parts,
    )  # fmt: skip
    return page


def curves_of(measurements: Sequence[Measurement]) -> dict[str, Curve]:
    """Return the accuracy over the radius under each attack, and in the worst case where there are several."""
    curves: dict[str, dict[float, tuple[float, int]]] = {}
    for measured in measurements:
        accuracies, n = measured.evaluation.accuracies(), len(measured.evaluation)
        clean = accuracies.pop("clean")
        if len(accuracies) == 2:  # an attack, and the worst case of it alone
            accuracies.pop(WORST_CASE, None)
        for name, share in accuracies.items():
            curves.setdefault(name, {0.0: (clean, n)})[_threat(measured).eps] = (share, n)
    return dict(curves)


def _threat(measured: Measurement) -> Threat:
    return parse_threat(measured.records[0].threat)
