"""The parts of a study, as data: cells to train, and columns to measure on each."""

from __future__ import annotations

from dataclasses import dataclass

from advalign import attacks, models, objectives
from advalign.errors import require
from advalign.evaluation.transfer import transferable
from advalign.threats import Linf
from advalign.training.recipes import Recipe

CLEAN = "clean"


@dataclass(frozen=True, kw_only=True)
class Column:
    """An accuracy that is measured on every cell.

    Raises:
        UserError: an unknown attack, a black box whose attack cannot be transferred, or n below 1.
    """

    heading: str
    attack: str = CLEAN
    n: int | None = None
    """test images at most, a stratified subset that is the same for every cell; all if None"""
    black_box: bool = False
    """whether the attack is made on the study's surrogate and transferred to the cell's model"""
    data: str | None = None
    """only cells with this data set have the column; all cells if None"""
    note: str = ""
    """what readers must know who expect another attack under the heading; it stands below the table"""

    def __post_init__(self) -> None:
        clean = self.attack == CLEAN
        require(
            not (clean and self.black_box),
            lambda: f"column {self.heading!r} is a black box, and names no attack that is made on the surrogate",
        )
        require(self.n is None or self.n >= 1, lambda: f"column {self.heading!r}: n={self.n} must be at least 1")
        if not clean:
            attack = attacks.parse(self.attack, threat=Linf(8 / 255))
            object.__setattr__(self, "attack", str(attack))
            if self.black_box:
                transferable(attack)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A method trained in one way; the study sets the seed. Cells of one row differ in their data set.

    Raises:
        UserError: an unknown method or model.
    """

    method: str
    data: str
    model: str
    recipe: Recipe
    row: str = ""
    """the row's name in the table; the method if empty"""
    curve: str = ""
    """the curve of a figure to which the cell belongs"""
    at: float | str = ""
    """the cell's position on the curve: a value of the argument along which the curve runs"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", str(objectives.parse(self.method)))
        object.__setattr__(self, "model", models.canonical(self.model))
        object.__setattr__(self, "row", self.row or self.method)
