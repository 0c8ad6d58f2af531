"""Records as a table: a row per method, a column per attack, mean and spread over seeds; what all rows share below."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table as RichTable

from advalign.evaluation import WORST_CASE
from advalign.runs import Record

# What an accuracy depends on beside method, attack and seed; every record's value is shown, in the row or the caption.
_SETTING = {
    "threat": "threat",
    "data": "data",
    "model": "model",
    "training_images": "training images",
    "epochs": "epochs",
    "checkpoint": "checkpoint",
    "n": "test images",
}


@dataclass(frozen=True)
class Table:
    """Text cells by row; `best` holds the (row, column) of each column's best number."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]]
    caption: str

    def markdown(self) -> str:
        """Return the table as Markdown, each column's best number in bold, and the caption below."""
        marked = [
            [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *marked]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.caption}"


def accuracy_table(records: Sequence[Record]) -> Table:
    """Tabulate accuracies in per cent: mean, and standard deviation where there are several seeds.

    The worst case is over the attacks of the same evaluation.
    """
    attacks = sorted(dict.fromkeys(r.attack for r in records), key=lambda a: (a != "clean", a == WORST_CASE))
    shared = [key for key in _SETTING if len({getattr(r, key) for r in records}) == 1]
    differing = [key for key in _SETTING if key not in shared]
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record.method, *(str(getattr(record, key)) for key in differing)), []).append(record)
    cells = [[[r.accuracy for r in group if r.attack == attack] for attack in attacks] for group in groups.values()]
    best = frozenset(
        (max(filled, key=lambda i: mean(cells[i][j])), j + 1)
        for j in range(len(attacks))
        if len(filled := [i for i in range(len(cells)) if cells[i][j]]) > 1
    )
    rows = tuple((key[0], *map(_cell, cells[i]), *key[1:]) for i, key in enumerate(groups))
    seeds = " ".join(map(str, sorted({r.seed for r in records})))
    caption = "; ".join(
        ["Accuracy in %", *(f"{_SETTING[key]}: {getattr(records[0], key)}" for key in shared), f"seeds: {seeds}"]
    )
    return Table(("method", *attacks, *(_SETTING[key] for key in differing)), rows, best, caption + ".")


def print_table(console: Console, table: Table) -> None:
    """Print the table to a terminal, each column's best number in bold."""
    shown = RichTable(caption=table.caption, caption_justify="left")
    for j, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if j == 0 else "right", overflow="fold")
    for i, row in enumerate(table.rows):
        shown.add_row(*(f"[bold]{cell}[/]" if (i, j) in table.best else cell for j, cell in enumerate(row)))
    console.print(shown, highlight=False)


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"
