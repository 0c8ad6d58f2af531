"""A frontier as a table, in words, and as one HTML page."""

from __future__ import annotations

from pathlib import Path

from advalign.frontier.result import Frontier
from advalign.report.tables import Table


def curve_table(traced: Frontier) -> Table:
    """Tabulate the settings, from the accurate network to the robust one; the chosen one stands out."""
    rows = []
    for held_out, test in zip(traced.held_out.points, traced.test.points, strict=True):
        cells = []
        for point in (held_out, test):
            floor = "–" if point.floor is None else f"{100 * float(point.floor.double().mean()):.1f}"
            cells += [f"{100 * float(flags.double().mean()):.1f}" for flags in (point.clean, point.robust)] + [floor]
        rows.append((str(test.setting), *cells))
    headings = (
        "setting",
        *(f"{what}, {where}" for where in ("held out", "test") for what in ("clean", "robust", "floor")),
    )
    best = frozenset((traced.chosen, column) for column in range(1, len(headings)))
    return Table(headings, tuple(rows), best, f"{traced.about['threat']}.")


def summary(traced: Frontier) -> list[str]:
    """Say what was chosen and what it costs."""
    return [repr(traced)]


def write_page(traced: Frontier) -> Path:
    """Write the page."""
    return traced.path / "frontier.html"
