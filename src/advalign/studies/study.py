"""What a study is, as data: cells to train, columns to measure on each, and what was published beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from advalign import attacks, models, objectives
from advalign.errors import require, unknown
from advalign.evaluation.transfer import transferable
from advalign.threats import Linf
from advalign.training.recipes import Recipe

if TYPE_CHECKING:
    from advalign.report.page import FigureSection
    from advalign.studies.results import Results

CLEAN = "clean"
FigureBuilder = Callable[["Results"], "FigureSection | None"]
"""Draws what the results so far are enough for."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """An accuracy that is measured on every cell.

    Raises:
        UserError: an unknown attack, one that cannot be shown to another model as a black box has to, or n below 1.
    """

    heading: str
    attack: str = CLEAN
    n: int | None = None
    """test images at most, a stratified draw that is the same for every cell; all if not given"""
    black_box: bool = False
    """the attack is made on the study's surrogate and shown to the cell's model"""
    data: str | None = None
    """the column is of the cells with this data set; of all if not given"""

    def __post_init__(self) -> None:
        if self.attack != CLEAN:
            canonical = str(attacks.parse(self.attack, threat=Linf(8 / 255)))
            object.__setattr__(self, "attack", canonical)
            if self.black_box:
                transferable(attacks.parse(self.attack, threat=Linf(8 / 255)))
        clean = self.black_box and self.attack == CLEAN
        require(
            not clean,
            lambda: f"column {self.heading!r} is a black box, and names no attack that is made on the surrogate",
        )
        require(self.n is None or self.n >= 1, lambda: f"column {self.heading!r}: n={self.n} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method trained in one way; its seed is the study's affair. Cells of one row differ in their data.

    Raises:
        UserError: an unknown method or model.
    """

    method: str
    data: str
    model: str
    recipe: Recipe
    row: str = ""
    """the row's name in the table; the method if not given"""
    curve: str = ""
    """the curve of a figure that the cell is a point of"""
    at: float | str = ""
    """where on the curve"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", str(objectives.parse(self.method)))
        object.__setattr__(self, "model", models.canonical(self.model))
        object.__setattr__(self, "row", self.row or self.method)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A declared set of runs and evaluations that makes a table and its figures.

    Raises:
        UserError: two columns of one heading, two cells for one place, an unknown row, no surrogate for a black box, or
            a column of which it is not clear which data it is measured on.
    """

    name: str
    title: str
    cells: tuple[Cell, ...]
    """in the order of the table"""
    columns: tuple[Column, ...]
    seeds: int = 1
    """how many, from 0 on, where the caller does not say"""
    surrogate: Cell | None = None
    """what black-box attacks are made on; its seed is 0"""
    first: tuple[str, ...] = ()
    """rows that are done before the others, since a part of the table is of use with them"""
    published: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """accuracy in per cent by row and heading; rows that have no cell are shown as well"""
    source: str = ""
    """where the published numbers are from"""
    figures: tuple[FigureBuilder, ...] = ()
    declared: str = ""
    """the text of the file that it was read from"""

    def __post_init__(self) -> None:
        require(bool(self.cells and self.columns), lambda: f"study {self.name!r} has no cells or no columns")
        require(self.seeds >= 1, lambda: f"seeds={self.seeds} must be at least 1")
        _distinct("column", [column.heading for column in self.columns])
        _distinct("row", [f"{cell.row}, {cell.data}" for cell in self.cells])
        known = {cell.data for cell in self.cells}
        for column in self.columns:
            if column.data is not None and column.data not in known:
                raise unknown(f"data of column {column.heading!r}", column.data, known)
        for row in self.rows if any(column.data is None for column in self.columns) else ():
            several = sorted({cell.data for cell in self.cells if cell.row == row})
            require(
                len(several) == 1,
                lambda: f"row {row!r} has the data {' and '.join(several)}: each column needs its data",
            )
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
        """The cells in the order in which they are done."""
        return sorted(self.cells, key=lambda cell: cell.row not in self.first)


def _distinct(what: str, names: Iterable[str]) -> None:
    names = list(names)
    for name in names:
        require(names.count(name) == 1, lambda: f"{what} {name!r} is there twice")
