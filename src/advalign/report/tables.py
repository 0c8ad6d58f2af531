"""Records as a table: a row per method and setting, a column per attack, mean and spread over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, sqrt
from statistics import mean, stdev

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from advalign.attacks.names import parse_name, worst_cases_among
from advalign.runs import Record
from advalign.training.recipes import Recipe

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

FLOOR = 0.5  # points that another training seed moves an accuracy by anyway
NEAR = (
    "nearer than the 95 % interval of the difference reaches (Student's t over seeds; of a single seed, the binomial's "
    f"over its test images) or than {FLOOR} points"
)
NOISE = f"bold: the best of a column, natural models aside; grey, or italic: not told from it, being {NEAR}"
_UNDEFENDED = ("natural", "contrast")  # they compete for nothing: what they give up shows in other columns

_PIPE = 160  # characters

_LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$"}
)


@dataclass(frozen=True)
class Row:
    """Records that differ in attack and training seed alone; `extras` tell the row from others of its method."""

    method: str
    extras: tuple[str, ...]
    records: tuple[Record, ...]
    telling: tuple[int, ...] = ()
    """which of the extras tell runs apart, or weights from elsewhere, and not only the one kind from the other"""

    @property
    def traits(self) -> tuple[str, ...]:
        """What a figure names the row by, beside its method."""
        return tuple(self.extras[i] for i in self.telling)

    def accuracies(self, attack: str) -> dict[int, float]:
        """Return the accuracy of each seed, in per cent."""
        return {record.seed: 100 * record.accuracy for record in self.records if record.attack == attack}

    def variance(self, attack: str) -> float:
        """Return the squared standard error of the mean, over seeds; of a single seed, over the test images."""
        values = list(self.accuracies(attack).values())
        if len(values) > 1:
            return stdev(values) ** 2 / len(values)
        n = next(record.n for record in self.records if record.attack == attack)
        return values[0] * (100 - values[0]) / n

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
    faint: frozenset[tuple[int, int]] = frozenset()
    """The (row, column) of numbers that are inside the noise of their column's best."""

    def markdown(self) -> str:
        """Return the table as Markdown, the best in bold, what is inside its noise in italics, the caption below."""
        marked = [[cell.replace("|", r"\|") for cell in row] for row in self.rows]
        for cells, mark in ((self.best, "**"), (self.faint, "*")):
            for i, j in cells:
                marked[i][j] = f"{mark}{marked[i][j]}{mark}"
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *marked]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.caption}"

    def latex(self) -> str:
        """Return the table as LaTeX with the rules of booktabs, the best in bold, its noise in italics."""
        lines = [[cell.translate(_LATEX) for cell in row] for row in (self.columns, *self.rows)]
        for cells, command in ((self.best, "textbf"), (self.faint, "textit")):
            for i, j in cells:
                lines[i + 1][j] = rf"\{command}{{{lines[i + 1][j]}}}"
        head, *body = (" & ".join(line) + r" \\" for line in lines)
        many = len(self.columns)
        columns = "l" * (many - 1) + r"p{0.5\linewidth}" if self.prose else "l" + "r" * (many - 1)
        begin, end = rf"\begin{{tabular}}{{{columns}}}", r"\end{tabular}"
        return "\n".join([begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", end, f"% {self.caption}"])

    def csv(self) -> str:
        """Return header and cells as CSV, unmarked."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((self.columns, *self.rows))
        return text.getvalue()


Flags = Mapping[str, Mapping[str, str]]
"""By a run's id, the flags of `advalign train` that its recipe stands for."""


def rows_of(records: Sequence[Record], flags: Flags | None = None) -> tuple[list[Row], list[str]]:
    """Group records into rows; also return the names of the columns that tell rows of one method apart.

    Recipes are told apart by the flags in which they differ, or by their digests where no flags are known.
    """
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
    ours, others = ([record for record in first if bool(record.run) == known] for known in (True, False))
    telling = tuple(
        i
        for i, key in enumerate(shown)  # of others the checkpoint is the file, which they are named by
        if _differ(ours, key) or (key != "checkpoint" and _differ(others, key))
    )
    rows = [Row(group[0].method, _tell(group[0], shown)[1:], tuple(group), telling) for group in groups.values()]
    if "recipe" in shown:
        rows = _with_flags(rows, shown.index("recipe"), flags or {})
    return rows, [labels[key] for key in shown]


def _differ(records: Sequence[Record], key: str) -> bool:
    return len({_told(record, key) for record in records}) > 1


def _with_flags(rows: Sequence[Row], column: int, flags: Flags) -> list[Row]:
    """Replace digests of recipes by the flags in which rows differ that are otherwise the same."""
    known = [flags.get(row.records[0].run, {}) for row in rows]
    rest = [(row.method, *row.extras[:column], *row.extras[column + 1 :]) for row in rows]
    alike: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for same, each in zip(rest, known, strict=True):
        if each:
            alike.setdefault(same, []).append(each)
    names = [name for name in Recipe.__slots__ if any(len({e.get(name) for e in some}) > 1 for some in alike.values())]
    told = [", ".join(f"{name}={each[name]}" for name in names if name in each) for each in known]
    cells = list(zip(rest, told, strict=True))
    return [  # what no flag tells, such as another guest, the digest does
        replace(row, extras=(*row.extras[:column], text, *row.extras[column + 1 :]))
        if text and cells.count((same, text)) == 1
        else row
        for row, (same, text) in zip(rows, cells, strict=True)
    ]


def _by_run(group: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Split records by run where one seed has several: they differ in what no record tells, such as their guests."""
    runs_of = {(record.seed, record.run) for record in group}
    if len(runs_of) == len({seed for seed, _ in runs_of}):
        return {(): list(group)}
    runs: dict[tuple[str, ...], list[Record]] = {}
    for record in group:
        runs.setdefault((record.run,), []).append(record)
    return runs


def accuracy_table(records: Sequence[Record], flags: Flags | None = None) -> Table:
    """Tabulate accuracies in per cent: mean, and standard deviation over training seeds where there are several.

    Rows are not averaged over anything else: another recipe, data set or threat is another row.
    """
    rows, extras = rows_of(records, flags)
    measured = dict.fromkeys(record.attack for record in records)
    worst = [each for each in worst_cases_among(measured) if len(parse_name(each).members) > 1]
    attacks = sorted(measured, key=lambda a: (a != "clean", a in worst))
    attacks = [each for each in attacks if not parse_name(each).is_worst_case or each in worst]  # of one attack: itself
    names = {worst[0]: "worst case"} if len(worst) == 1 else {}
    best, faint = marks(rows, attacks)
    shared = [f"{label}: {_told(records[0], key)}" for key, label in _TOLD.items() if label not in extras]
    seeds = ", ".join(map(str, sorted({r.seed for r in records if r.run}))) or "unknown"
    if _TOLD["n"] not in extras:
        share = f"{100 / records[0].n:.2g}"
        shared.append(f"one image is {share} point{'' if share == '1' else 's'}")
    notes = ["Accuracy in %", *shared, f"seeds: {seeds}", *(f"worst case: {name}" for name in names)]
    if not all(record.run for record in records):
        notes.append("unknown: nobody knows how weights from elsewhere were trained")
    if any(len(row.accuracies(attack)) > 1 for row in rows for attack in attacks):
        notes.append("±: standard deviation over seeds")
    if best:
        notes.append(NOISE)
    return Table(
        ("method", *(names.get(attack, attack) for attack in attacks), *extras),
        tuple((row.method, *map(row.cell, attacks), *row.extras) for row in rows),
        best,
        "; ".join(notes) + ".",
        faint=faint,
    )


CellSet = frozenset[tuple[int, int]]


def marks(rows: Sequence[Row], attacks: Sequence[str]) -> tuple[CellSet, CellSet]:
    """Return (row, column) of each attack's best accuracy, and of those inside its noise; column 0 is the method.

    Natural models compete only with one another.
    """
    best, faint = set(), set()
    defended = {i for i, row in enumerate(rows) if any(r.method not in _UNDEFENDED for r in row.records)}
    for j, attack in enumerate(attacks, 1):
        filled = [i for i, row in enumerate(rows) if row.accuracies(attack) and (i in defended or not defended)]
        if len(filled) > 1:
            first = max(filled, key=lambda i: mean(rows[i].accuracies(attack).values()))
            best.add((first, j))
            faint |= {(i, j) for i in filled if i != first and inside_noise(rows[i], rows[first], attack)}
    return frozenset(best), frozenset(faint)


def inside_noise(row: Row, other: Row, attack: str) -> bool:
    """Tell whether two rows cannot be told apart, both measured under the attack."""
    from scipy.stats import t

    values = [list(each.accuracies(attack).values()) for each in (row, other)]
    freedom = sum(map(len, values)) - 2 if min(map(len, values)) > 1 else inf
    reach = float(t.ppf(0.975, freedom)) * sqrt(row.variance(attack) + other.variance(attack))
    return abs(mean(values[0]) - mean(values[1])) <= max(FLOOR, reach)


def print_table(console: Console, table: Table) -> None:
    """Print the table, the best in bold, what is inside its noise dimmed; into a pipe or a log at its full width."""
    shown = RichTable(caption=table.caption, caption_justify="left")
    for j, column in enumerate(table.columns):
        left = j == 0 or table.prose
        shown.add_column(
            column, justify="left" if left else "right", overflow="fold", no_wrap=j == 0 and not table.prose
        )
    for i, row in enumerate(table.rows):
        styles = ["bold" if (i, j) in table.best else "dim" if (i, j) in table.faint else "" for j in range(len(row))]
        shown.add_row(*(Text(cell, style) for cell, style in zip(row, styles, strict=True)))
    console.print(shown, highlight=False, width=None if console.is_terminal else max(console.width, _PIPE), crop=False)


def _tell(record: Record, keys: Sequence[str]) -> tuple[str, ...]:
    return (record.method, *(_told(record, key) for key in keys))


def _told(record: Record, key: str) -> str:
    """Spell a field; of weights from elsewhere, which have no run, nobody knows how they were trained."""
    known = record.run or key not in ("training_images", "epochs", "recipe")
    return str(getattr(record, key)) if known else "unknown"
