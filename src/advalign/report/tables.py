"""Tables: text cells with the best of each column, as Markdown, LaTeX, CSV and on the terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from advalign.attacks.names import parse_name, quantized_parts, worst_cases_among
from advalign.attacks.spelled import remarks_on
from advalign.report.noise import NOISE, CellSet, mark_best
from advalign.report.rows import SHOWN_FIELDS, Flags, field_text, group_rows
from advalign.runs import Record

_PIPE_WIDTH = 160  # characters
_NUMBER = re.compile(r"[-+]?[\d.]+( ± [\d.]+)?")

_LATEX = str.maketrans(
    {sign: rf"\{sign}" for sign in "&%_#${}"}
    | {"\\": r"\textbackslash{}", "^": r"\^{}", "~": r"\~{}", "±": r"$\pm$", "–": "--", "Δ": r"$\Delta$"}
)


@dataclass(frozen=True)
class Table:
    """Text cells by row, and which of them are marked."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    best: CellSet
    """The best number of each column."""
    caption: str
    prose: bool = False
    """Whether cells are words, not numbers: aligned left, and wrapped."""
    faint: CellSet = frozenset()
    """The numbers that are inside the noise of their column's best."""

    def with_notes(self, notes: Iterable[str]) -> Table:
        """Return the table with what a reader must know of the images behind its caption."""
        return replace(self, caption=" ".join((self.caption, *(f"Images: {note}." for note in notes if note))))

    def markdown(self) -> str:
        """Return the table as Markdown: the best in bold, what is inside its noise in italics, the caption below."""
        marked = [[_markdown(cell) for cell in row] for row in self.rows]
        for cells, mark in ((self.best, "**"), (self.faint, "*")):
            for i, j in cells:
                marked[i][j] = f"{mark}{marked[i][j]}{mark}"
        lines = [[_markdown(column) for column in self.columns], ["---", *["---:"] * (len(self.columns) - 1)], *marked]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{self.caption}"

    def latex(self) -> str:
        """Return the table as LaTeX with booktabs rules: the best in bold, what is inside its noise in italics."""
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
        lines = ([_csv(cell) for cell in row] for row in (self.columns, *self.rows))
        csv.writer(text, lineterminator="\n").writerows(lines)
        return text.getvalue()


def _markdown(cell: str) -> str:
    """Escape what would end the cell, and what a viewer would take for HTML."""
    return cell.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def _csv(cell: str) -> str:
    """Put an apostrophe before what a spreadsheet would compute; signed numbers are numbers."""
    formula = cell[:1] in ("=", "+", "-", "@", "\t", "\r") and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if formula else cell


def accuracy_table(records: Sequence[Record], flags: Flags | None = None) -> Table:
    """Tabulate accuracies in per cent: mean, and standard deviation over training seeds where there are several.

    Nothing else is averaged over: another recipe, data set or threat is another row.
    """
    rows, extras = group_rows(records, flags)
    measured = dict.fromkeys(record.attack for record in records)
    worst = [each for each in worst_cases_among(measured) if len(parse_name(each).members) > 1]
    attacks = sorted(measured, key=lambda a: (a != "clean", a in worst))
    attacks = [each for each in attacks if not parse_name(each).is_worst_case or each in worst]  # of one attack: itself
    names = _headings(attacks, worst)
    best, faint = mark_best(rows, attacks)
    shared = [f"{label}: {field_text(records[0], key)}" for key, label in SHOWN_FIELDS.items() if label not in extras]
    seeds = ", ".join(map(str, sorted({r.seed for r in records if r.run}))) or "unknown"
    if SHOWN_FIELDS["n"] not in extras:
        share = f"{100 / records[0].n:.2g}"
        shared.append(f"one image is {share} point{'' if share == '1' else 's'}")
    notes = ["Accuracy in %", *shared, f"seeds: {seeds}"]
    notes += [f"{heading}: {name}" for name, heading in names.items() if name in worst]
    notes += [f"{name}: {remark}" for name, remark in remarks_on(attacks).items()]
    notes += [f"every attack is quantized to {argument}" for argument in _quantization(attacks)]
    if not all(record.run for record in records):
        notes.append("unknown: weights without a training record")
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


def _headings(attacks: Sequence[str], worst: Sequence[str]) -> dict[str, str]:
    """Return short headings of the only worst case, and of attacks that all are quantized; the caption has the rest."""
    headings = {worst[0]: "worst case"} if len(worst) == 1 else {}
    if _quantization(attacks):
        headings |= {name: parts[0] for name in attacks if (parts := quantized_parts(name)) is not None}
    return headings


def _quantization(attacks: Sequence[str]) -> list[str]:
    """Return what all attacks are quantized to, `bits=8`; nothing if they are not all, or not alike."""
    single = [name for name in attacks if name != "clean" and not parse_name(name).is_worst_case]
    to = {None if (parts := quantized_parts(name)) is None else parts[1] for name in single}
    return [each for each in to if each is not None] if len(to) == 1 else []


def print_table(console: Console, table: Table) -> None:
    """Print the table: the best in bold, what is inside its noise dimmed; into a pipe or a log at its full width."""
    shown = RichTable()
    # Names that leave no room for the numbers go over several lines.
    short = max((len(row[0]) for row in table.rows), default=0) <= console.width // 2
    for j, column in enumerate(table.columns):
        justify = "left" if j == 0 or table.prose else "right"
        shown.add_column(column, justify=justify, overflow="fold", no_wrap=j == 0 and short and not table.prose)
    for i, row in enumerate(table.rows):
        styles = ["bold" if (i, j) in table.best else "dim" if (i, j) in table.faint else "" for j in range(len(row))]
        shown.add_row(*(Text(cell, style) for cell, style in zip(row, styles, strict=True)))
    width = None if console.is_terminal else max(console.width, _PIPE_WIDTH)
    console.print(shown, highlight=False, width=width, crop=False)
    console.print(Text(table.caption, "italic"), width=width)
