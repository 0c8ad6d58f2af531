"""Six bases with and without six plug-ins on digits, several seeds: `python -m advalign.studies.methods OUT`.

Every run is a run folder, guests are shared, and what is finished is not done again: stop and repeat as you like, or
give each of several processes seeds of its own and finish with one call for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated

import tyro
from rich.console import Console

from advalign.attacks.names import worst_cases_among
from advalign.data import load
from advalign.errors import require
from advalign.evaluation.measure import measure
from advalign.report.tables import Row, Table, print_table, rows_of
from advalign.runs import Record
from advalign.runtime.device import one_thread
from advalign.runtime.files import write_lines
from advalign.runtime.progress import say
from advalign.studies.demo import ATTACKS, MODEL
from advalign.training.recipes import digits
from advalign.training.train import train

BASES = ("at", "alp", "trades", "mart", "hat")
PLUGINS = ("kd", "bgat", "lbgat", "vfd", "ar-at", "afa")
# Nothing joins natural training, which has no adversarial examples; AFA alone has a clean last layer like it.
METHODS = ("natural", "afa", *(base + plugin for base in BASES for plugin in ("", *(f"+{name}" for name in PLUGINS))))


def methods(
    out: Annotated[Path, tyro.conf.Positional], seeds: tuple[int, ...] = (0, 1, 2), console: Console | None = None
) -> list[Record]:
    """Train and evaluate every method with every seed, at the demo's scale, and write the records and their table.

    Args:
        out: folder of the runs and of `records.jsonl`.
        seeds: of the runs.
    """
    console = console or Console()
    data, records = load("digits"), []
    with one_thread():
        for seed in seeds:
            recipe = replace(digits(), seed=seed)
            for method in METHODS:
                run = train(
                    method, data=data, model=MODEL, recipe=recipe, runs=out / "runs", device="cpu", console=console
                )
                require(run.finished, lambda: f"stopped at {method}, seed {seed}: the same command goes on")
                if not run.records:
                    measure(run.path, ATTACKS, data=data, eps=recipe.eps, device="cpu", console=Console(quiet=True))
                records += run.records
    write_lines(out / "records.jsonl", [asdict(record) for record in records])
    print_table(console, comparison(records))
    say(console, f"Records: {out / 'records.jsonl'}")
    return records


def comparison(records: Sequence[Record]) -> Table:
    """Tabulate clean, PGD-20 and worst-case accuracy, and what a plug-in changes beside its base alone.

    A change counts if it has the same sign with every seed, and lies outside of one threshold a column: twice the
    standard error of the difference of two means over seeds, its standard deviation pooled over all methods. The others
    are in parentheses.
    """
    rows = {row.method: row for row in rows_of(records)[0]}
    attacks = ("clean", "pgd(steps=20)", worst_cases_among(record.attack for record in records)[0])
    noise = {attack: _noise(list(rows.values()), attack) for attack in attacks}
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


def _noise(rows: Sequence[Row], attack: str) -> float:
    """Return twice the standard error of a difference of two rows' means."""
    values = [list(row.accuracies(attack).values()) for row in rows]
    several = [each for each in values if len(each) > 1]
    if not several:
        return float("nan")
    variance = mean(stdev(each) ** 2 for each in several)
    return 2 * sqrt(2 * variance / len(several[0]))


def _change(row: Row, base: Row, attack: str, noise: float) -> str:
    ours, theirs = row.accuracies(attack), base.accuracies(attack)
    changes = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    change, agree = mean(changes), min(changes) > 0 or max(changes) < 0
    return f"{change:+.1f}" if agree and abs(change) > noise else f"({change:+.1f})"


if __name__ == "__main__":
    tyro.cli(methods)
