"""Trained networks beside frontiers: the robust accuracy of each way at the same clean accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import mean

from advalign.attacks.names import worst_cases_among
from advalign.frontier.result import StoredFrontier
from advalign.frontier.trace import Curve
from advalign.report.frontier import curve_attacks, frontier_name
from advalign.report.frontier_words import percent
from advalign.report.page import TableSection
from advalign.report.rows import Flags, Row, group_rows
from advalign.report.sources import Scope
from advalign.report.tables import Table
from advalign.runs import Record


def frontiers_of(scope: Scope, frontiers: Sequence[StoredFrontier]) -> list[StoredFrontier]:
    """Return the frontiers whose curves are on the images of a scope, in its threat model."""
    return [each for each in frontiers if _place(each) == (scope.images, scope.threat, scope.n)]


def _place(stored: StoredFrontier) -> tuple[str, str, int]:
    """Return images, threat and number; no number where test images were set apart, so that others were measured."""
    apart = str(stored.content.get("options", {}).get("held_out", "")).startswith("test:")
    return stored.content["images"], stored.content["threat"], -1 if apart else stored.test.images


def same_clean_sections(
    name: str, records: Sequence[Record], flags: Flags, frontiers: Sequence[StoredFrontier]
) -> list[TableSection]:
    """Tabulate the accuracies of trained methods, and each frontier's robust accuracy at the same clean accuracy."""
    rows = []
    for row in group_rows(records, flags)[0]:
        worst = worst_cases_among(record.attack for record in row.records)
        if clean := list(row.accuracies("clean").values()) if worst else []:
            beside = (robust_at(each.test, mean(clean)) for each in frontiers)
            cells = ("–" if robust is None else f"{robust:.1f}" for robust in beside)
            rows.append((_name(row), row.cell("clean"), row.cell(worst[0]), *cells, worst[0]))
    if not rows or not frontiers:
        return []
    names = [frontier_name(each) for each in frontiers]
    attacks = "; ".join(f"{name}: {curve_attacks(each)}" for name, each in zip(names, frontiers, strict=True))
    caption = (
        "Accuracy in %. A frontier's robust accuracy at the same clean accuracy is read off the straight line between "
        f"two settings; – outside its range. Attacks on the settings: {attacks}. Whatever was attacked by less "
        "looks better for that. A mix costs two forward passes, a trained network one."
    )
    columns = ("method", "clean", "robust", *names, "attacked by")
    return [TableSection(f"At the same clean accuracy: {name}", Table(columns, tuple(rows), frozenset(), caption))]


def _name(row: Row) -> str:
    return ", ".join((row.method, *row.traits))


def robust_at(curve: Curve, clean: float) -> float | None:
    """Return a curve's highest robust accuracy at a clean accuracy, both in per cent; None outside its range."""
    points = [(percent(point.clean), percent(point.robust)) for point in curve.points]
    found = [robust for at, robust in points if at == clean]
    for (left, low), (right, high) in pairwise(points):
        if min(left, right) < clean < max(left, right):
            found.append(low + (high - low) * (clean - left) / (right - left))
    return max(found, default=None)
