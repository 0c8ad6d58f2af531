"""The noise of an accuracy: whether two rows of a table differ by more, and which numbers are near a column's best."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, sqrt
from statistics import mean, stdev

from advalign.report.rows import Row

FLOOR = 0.5
"""Points by which another training seed moves an accuracy anyway."""
NEAR = (
    "within the 95 % interval of the difference (Student's t over seeds; for a single seed, the binomial over its test "
    f"images) or within {FLOOR} points"
)
NOISE = f"bold: the best of a column, natural models aside; grey or italic: not distinguishable from it, {NEAR}"

CellSet = frozenset[tuple[int, int]]
"""Cells of a table, each (row, column)."""


def inside_noise(row: Row, other: Row, attack: str) -> bool:
    """Return whether the difference of two rows, both measured under the attack, is inside the noise.

    The noise is the 95 % interval of the difference of two means: over several seeds Student's t, of single seeds the
    binomial over the test images; at least `FLOOR` points.
    """
    from scipy.special import stdtrit  # scipy.stats has the same, and takes a second to import

    values = [list(each.accuracies(attack).values()) for each in (row, other)]
    freedom = sum(map(len, values)) - 2 if min(map(len, values)) > 1 else inf
    reach = float(stdtrit(freedom, 0.975)) * sqrt(row.variance(attack) + other.variance(attack))
    return abs(mean(values[0]) - mean(values[1])) <= max(FLOOR, reach)


def pooled_noise(rows: Sequence[Row], attack: str) -> float:
    """Return one noise for all differences among many rows of equally many seeds; NaN if each has a single seed.

    It is twice the standard error of the difference of two means, with the variance over seeds pooled over all rows.
    """
    values = [list(row.accuracies(attack).values()) for row in rows]
    several = [accuracies for accuracies in values if len(accuracies) > 1]
    if not several:
        return float("nan")
    variance = mean(stdev(accuracies) ** 2 for accuracies in several)
    return 2 * sqrt(2 * variance / len(several[0]))


def mark_best(rows: Sequence[Row], attacks: Sequence[str]) -> tuple[CellSet, CellSet]:
    """Return the cells of each attack's best accuracy, and those inside its noise; column 0 is the method.

    Natural models and first stages compete only with one another: what they give up shows in other columns.
    """
    best, faint = set(), set()
    competing = {i for i, row in enumerate(rows) if row.competes}
    for j, attack in enumerate(attacks, 1):
        filled = [i for i, row in enumerate(rows) if row.accuracies(attack) and (i in competing or not competing)]
        if len(filled) > 1:
            first = max(filled, key=lambda i: mean(rows[i].accuracies(attack).values()))
            best.add((first, j))
            faint |= {(i, j) for i in filled if i != first and inside_noise(rows[i], rows[first], attack)}
    return frozenset(best), frozenset(faint)
