"""Records as a table: a row per method and setting, a column per attack, mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table as RichTable

from advalign.runs import Record

_SETTING = ("method", "data", "model", "checkpoint", "epochs", "training_images", "n")
_ATTACKS_FIRST, _ATTACKS_LAST = ("clean",), ("worst case",)


@dataclass(frozen=True)
class Table:
    """Text cells by row; `best` holds the (row, column) of each column's best number."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]]

    def markdown(self) -> str:
        """Return the table as Markdown, each column's best number in bold."""
        marked = [
            [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        lines = [self.columns, ["---"] * len(self.columns), *marked]
        return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def accuracy_table(records: Sequence[Record]) -> Table:
    """Tabulate accuracies in per cent: mean, and standard deviation where there are several seeds.

    Worst case compares only where the same attacks were run; every row states its setting.
    """
    names = list(dict.fromkeys(f"{r.attack}{f', {r.threat}' if r.threat else ''}" for r in records))
    attacks = sorted(names, key=lambda name: (name not in _ATTACKS_FIRST, name.startswith(_ATTACKS_LAST)))
    settings = list(dict.fromkeys(tuple(getattr(r, key) for key in _SETTING) for r in records))
    cells: list[list[list[float]]] = []
    seeds: list[list[int]] = []
    for setting in settings:
        mine = [r for r in records if tuple(getattr(r, key) for key in _SETTING) == setting]
        seeds.append(sorted({r.seed for r in mine}))
        cells.append(
            [[r.accuracy for r in mine if f"{r.attack}{f', {r.threat}' if r.threat else ''}" == name] for name in attacks]
        )
    best = frozenset(
        (max(filled, key=lambda i: mean(cells[i][j])), j + 1)
        for j in range(len(attacks))
        if len(filled := [i for i in range(len(settings)) if cells[i][j]]) > 1
    )
    columns = ("method", *attacks, "data", "model", "checkpoint", "epochs", "training images", "test images", "seeds")
    rows = tuple(
        (setting[0], *map(_cell, cells[i]), *map(str, setting[1:]), " ".join(map(str, seeds[i])))
        for i, setting in enumerate(settings)
    )
    return Table(columns, rows, best)


def print_table(console: Console, table: Table) -> None:
    """Print the table to a terminal, each column's best number in bold."""
    shown = RichTable(*table.columns)
    for i, row in enumerate(table.rows):
        shown.add_row(*(f"[bold]{cell}[/]" if (i, j) in table.best else cell for j, cell in enumerate(row)))
    console.print(shown)


def _cell(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * mean(values):.1f}{spread}"
