"""What a study is, as data: its cells and columns, the published numbers, and the figures drawn of its progress."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from advalign.errors import require, unknown
from advalign.report.page import FigureSection
from advalign.studies.cells import Cell, Column
from advalign.studies.progress import Progress

MOST_SEEDS = 1000
"""Seeds at most, each a training of every cell."""
FigureBuilder = Callable[[Progress], FigureSection | None]
"""Draws a figure from what is measured so far, or returns None if that is too little."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A declared set of runs and evaluations that makes a table and its figures.

    Raises:
        UserError: two columns with one heading, two cells with the same row and data set, an unknown row, no surrogate
            for a black box, or a column whose data set is ambiguous.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    """in the order of the table"""
    columns: tuple[Column, ...]
    seeds: int = 1
    """number of training seeds, if the caller does not set it"""
    first_seed: int = 0
    """the first seed; the others follow it"""
    surrogate: Cell | None = None
    """the model on which black-box attacks are made; its seed is 0"""
    first: tuple[str, ...] = ()
    """rows that are run before the others, since a part of the table is useful with them"""
    one_thread: bool = False
    """whether to compute on one CPU thread: for small images, and so that results do not depend on the machine"""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """accuracy in per cent by row and heading; rows without a cell are shown as well"""
    source: str = ""
    """source of the published numbers"""
    introduction: tuple[str, ...] = ()
    """paragraphs at the top of the page"""
    figures: tuple[FigureBuilder, ...] = ()
    declared: str = ""
    """the text of the file from which the study was read"""

    def __post_init__(self) -> None:
        require(bool(self.cells and self.columns), lambda: f"study {self.name!r} has no cells or no columns")
        check_seeds(self.seeds)
        _require_distinct("column", [column.heading for column in self.columns])
        _require_distinct("row", [f"{cell.row}, {cell.data}" for cell in self.cells])
        self._check_data_of_columns()
        for row in self.first:
            if row not in self.rows:
                raise unknown("row", row, self.rows)
        if any(column.black_box for column in self.columns):
            require(self.surrogate is not None, lambda: f"study {self.name!r}: black-box columns need a surrogate")
        if self.surrogate is not None:
            data = {cell.data for cell in (self.surrogate, *self.cells)}
            require(len(data) == 1, lambda: f"study {self.name!r}: with a surrogate, all cells must have its data")

    @property
    def rows(self) -> list[str]:
        """The rows' names, in the order of the table."""
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def in_order(self) -> list[Cell]:
        """The cells in the order in which they are run."""
        return sorted(self.cells, key=lambda cell: cell.row not in self.first)

    def _check_data_of_columns(self) -> None:
        known = {cell.data for cell in self.cells}
        for column in self.columns:
            if column.data is not None and column.data not in known:
                raise unknown(f"data of column {column.heading!r}", column.data, known)
        of_row: dict[str, set[str]] = {}
        for cell in self.cells if any(column.data is None for column in self.columns) else ():
            of_row.setdefault(cell.row, set()).add(cell.data)
        for row, names in of_row.items():
            data = sorted(names)
            require(
                len(data) == 1, lambda: f"row {row!r} has the data {' and '.join(data)}: each column needs its data"
            )


def check_seeds(seeds: int) -> None:
    """Refuse a number of seeds that is none, or more than anybody will wait for.

    Raises:
        UserError: it is below 1 or above `MOST_SEEDS`.
    """
    require(1 <= seeds <= MOST_SEEDS, lambda: f"seeds={seeds} must be at least 1 and at most {MOST_SEEDS}")


def _require_distinct(kind: str, names: Iterable[str]) -> None:
    for name, times in Counter(names).items():
        require(times == 1, lambda: f"{kind} {name!r} is there twice")
