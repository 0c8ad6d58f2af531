"""The table of all methods on digits: accuracies, and the change by each plug-in from its base alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from advalign.attacks.names import worst_cases_among
from advalign.report.noise import pooled_noise
from advalign.report.rows import Row, group_rows
from advalign.report.tables import Table
from advalign.runs import Record


def comparison(records: Sequence[Record]) -> Table:
    """Tabulate clean, PGD-20 and worst-case accuracy, and the change by each plug-in from its base alone.

    A change counts if it has the same sign with every seed and is larger than the column's pooled noise. The others are
    in parentheses.
    """
    rows = {row.method: row for row in group_rows(records)[0]}
    attacks = ("clean", "pgd(steps=20)", worst_cases_among(record.attack for record in records)[0])
    noise = {attack: pooled_noise(list(rows.values()), attack) for attack in attacks}
    cells = []
    for method, row in rows.items():
        base, _, plugin = method.partition("+")
        changes = [_change(row, rows[base], attack, noise[attack]) if plugin else "" for attack in attacks]
        cells.append((method, *(row.cell(attack) for attack in attacks), *changes))
    seeds = sorted({record.seed for record in records})
    first = records[0]
    caption = (
        f"Accuracy in %, mean ± standard deviation over {len(seeds)} seeds ({', '.join(map(str, seeds))}), of the best "
        f"checkpoint on {first.n} test images; data: {first.data}; model: {first.model}; training images: "
        f"{first.training_images}; epochs: {first.epochs}; threat: {rows['at'].records[0].threat}; worst case: "
        f"{attacks[-1]}. Δ: change from the base alone, of the same seed; in parentheses unless it has one sign with "
        f"all seeds and is larger than {', '.join(f'{noise[attack]:.1f}' for attack in attacks)} points, twice the "
        "standard error."
    )
    columns = ("method", "clean", "PGD-20", "worst case", "Δ clean", "Δ PGD-20", "Δ worst case")
    return Table(columns, tuple(cells), frozenset(), caption)


def _change(row: Row, base: Row, attack: str, noise: float) -> str:
    ours, theirs = row.accuracies(attack), base.accuracies(attack)
    changes = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    change, agree = mean(changes), min(changes) > 0 or max(changes) < 0
    return f"{change:+.1f}" if agree and abs(change) > noise else f"({change:+.1f})"
