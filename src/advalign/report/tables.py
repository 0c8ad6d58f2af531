"""Records as a table: a row per method and setting, a column per attack, mean and spread over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table as RichTable

from advalign.runs import Record

# What an accuracy depends on beside method, attack and training seed. The first are always told, in the row where they
# differ and in the caption where they do not; the others are told where rows could not be told apart without them.
_TOLD = {
    "threat": "threat",
    "data": "data",
    "model": "model",
    "training_images": "training images",
    "epochs": "epochs",
    "checkpoint": "checkpoint",
    "n": "test images",
}
_AT_NEED = {
    "recipe": "recipe",
    "images": "data digest",
    "precision": "precision",
    "attack_seed": "attack seed",
    "batch_size": "batch",
}

_LATEX = str.maketrans(
    {"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$"}
)


@dataclass(frozen=True)
class Row:
    """Records that differ in attack and training seed alone; `extras` tell the row from others of its method."""

    method: str
    extras: tuple[str, ...]
    records: tuple[Record, ...]

    def accuracies(self, attack: str) -> dict[int, float]:
        """Return the accuracy of each seed, in per cent."""
        return {record.seed: 100 * record.accuracy for record in self.records if record.attack == attack}

    def cell(self, attack: str) -> str:
        """Spell mean and standard deviation; where not all of the row's seeds were measured, how many were."""
        values = list(self.accuracies(attack).values())
        if not values:
            return "–"
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        seeds = len({record.seed for record in self.records})
        return f"{mean(values):.1f}{spread}" + (f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else "")


@dataclass(frozen=True)
class Table:
    """Text cells by row; `best` holds the (row, column) of each column's best number."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]]
    caption: str
    prose: bool = False
    """Cells are words, not numbers: set left, and wrapped."""

    def markdown(self) -> str:
        """Return the table as Markdown, each column's best number in bold, and the caption below."""
        marked = [
            [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *marked]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.caption}"

    def latex(self) -> str:
        """Return the table as LaTeX with the rules of booktabs, each column's best number in bold."""
        lines = [[cell.translate(_LATEX) for cell in row] for row in (self.columns, *self.rows)]
        for i, j in self.best:
            lines[i + 1][j] = rf"\textbf{{{lines[i + 1][j]}}}"
        head, *body = (" & ".join(line) + r" \\" for line in lines)
        columns = "l" + "r" * (len(self.columns) - 1)
        begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
        return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end, f"% {self.caption}"])


def rows_of(records: Sequence[Record]) -> tuple[list[Row], list[str]]:
    """Group records into rows; also return the names of the columns that tell rows of one method apart."""
    keys = (*_TOLD, *_AT_NEED)
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in dict.fromkeys(records):
        groups.setdefault((record.method, *(getattr(record, key) for key in keys)), []).append(record)
    groups = {(*key, *run): part for key, group in groups.items() for run, part in _by_run(group).items()}
    first = [group[0] for group in groups.values()]
    shown = [key for key in _TOLD if len({getattr(record, key) for record in first}) > 1]
    for key in (*_AT_NEED, "run"):
        if len({_tell(record, shown) for record in first}) < len(first):
            shown.append(key)
    labels = {**_TOLD, **_AT_NEED, "run": "run"}
    rows = [Row(group[0].method, _tell(group[0], shown)[1:], tuple(group)) for group in groups.values()]
    return rows, [labels[key] for key in shown]


def _by_run(group: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Split records by run where one seed has several: they differ in what no record tells, such as their guests."""
    runs_of = {(record.seed, record.run) for record in group}
    if len(runs_of) == len({seed for seed, _ in runs_of}):
        return {(): list(group)}
    runs: dict[tuple[str, ...], list[Record]] = {}
    for record in group:
        runs.setdefault((record.run,), []).append(record)
    return runs


def worst_cases(records: Sequence[Record]) -> list[str]:
    """Return the worst cases measured, that over most attacks first."""
    return sorted({r.attack for r in records if r.attack.startswith("worst(")}, key=len, reverse=True)


def accuracy_table(records: Sequence[Record]) -> Table:
    """Tabulate accuracies in per cent: mean, and standard deviation over training seeds where there are several.

    Rows are not averaged over anything else: another recipe, data set or threat is another row.
    """
    rows, extras = rows_of(records)
    worst = worst_cases(records)
    attacks = sorted(dict.fromkeys(r.attack for r in records), key=lambda a: (a != "clean", a in worst))
    names = {worst[0]: "worst case"} if len(worst) == 1 else {}
    cells = [[row.accuracies(attack).values() for attack in attacks] for row in rows]
    best = frozenset(
        (max(filled, key=lambda i: mean(cells[i][j])), j + 1)
        for j in range(len(attacks))
        if len(filled := [i for i in range(len(rows)) if cells[i][j]]) > 1
    )
    shared = [f"{label}: {getattr(records[0], key)}" for key, label in _TOLD.items() if label not in extras]
    seeds = " ".join(map(str, sorted({r.seed for r in records})))
    if _TOLD["n"] not in extras:
        shared.append(f"one image is {100 / records[0].n:.2g} points")
    notes = ["Accuracy in %", *shared, f"seeds: {seeds}", *(f"worst case: {name}" for name in names)]
    return Table(
        ("method", *(names.get(attack, attack) for attack in attacks), *extras),
        tuple((row.method, *map(row.cell, attacks), *row.extras) for row in rows),
        best,
        "; ".join(notes) + ".",
    )


def print_table(console: Console, table: Table) -> None:
    """Print the table to a terminal, each column's best number in bold."""
    shown = RichTable(caption=table.caption, caption_justify="left")
    for j, column in enumerate(table.columns):
        shown.add_column(column, justify="left" if j == 0 or table.prose else "right", overflow="fold")
    for i, row in enumerate(table.rows):
        shown.add_row(*(f"[bold]{cell}[/]" if (i, j) in table.best else cell for j, cell in enumerate(row)))
    console.print(shown, highlight=False)


def _tell(record: Record, keys: Sequence[str]) -> tuple[str, ...]:
    return (record.method, *(str(getattr(record, key)) for key in keys))
