"""A job: one cell of a study with one seed. It knows its run's folder, and what is still to be done."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from advalign.attacks.names import parse_name
from advalign.data import Dataset, load
from advalign.errors import UserError
from advalign.runs import Record, Run
from advalign.studies.cells import Cell, Column
from advalign.threats import Threat


@dataclass(frozen=True)
class Job:
    """A run to train and measure: plain data that can be sent to another process."""

    cell: Cell
    """its recipe has the job's seed"""
    run: Run
    test_images: int
    images: str
    """digest of the data set"""
    columns: tuple[Column, ...] = ()
    surrogate: Job | None = None
    guests: tuple[Job, ...] = ()
    """the runs that training makes first if they do not exist yet"""

    @property
    def name(self) -> str:
        """The job's name on the terminal."""
        return f"{self.cell.row} on {self.cell.data}, seed {self.cell.recipe.seed}"

    @property
    def threat(self) -> Threat:
        """The threat model of evaluation: that of the recipe, also for natural training, which does not use it."""
        return self.cell.recipe.threat

    @property
    def training_status(self) -> str:
        """How far the training is, in words."""
        return (
            "trained" if self.run.finished else f"trained for {len(self.run.log)} of {self.cell.recipe.epochs} epochs"
        )

    @property
    def finished(self) -> bool:
        """Whether the run is trained and every column measured; False if its files cannot be read."""
        try:
            return self.run.finished and not self.missing()
        except UserError:
            return False

    def n(self, column: Column) -> int:
        """Return the number of test images on which the column is measured."""
        return min(column.n or self.test_images, self.test_images)

    def records(self) -> dict[Column, Record]:
        """Return the accuracies measured so far; of two records of one column the later.

        Raises:
            UserError: the run's records are damaged.
        """
        measured = {}
        for record in self.run.records:
            for column in self.columns:
                if self._is_of(record, column):
                    measured[column] = record
        return measured

    def missing(self) -> list[Column]:
        """Return the columns that are not measured yet."""
        measured = self.records()
        return [column for column in self.columns if column not in measured]

    def _is_of(self, record: Record, column: Column) -> bool:
        evaluation = (record.checkpoint, record.threat, record.n, record.precision, record.attack_seed)
        if evaluation != ("best", str(self.threat), self.n(column), "fp32", 0):
            return False
        if (record.epochs, record.images) != (self.cell.recipe.epochs, self.images):  # half-trained, or on other data
            return False
        if not column.black_box:
            return record.attack == column.attack
        surrogate = "" if self.surrogate is None else self.surrogate.run.id
        name = parse_name(record.attack)
        return name.attack == column.attack and name.surrogate_run == surrogate


@cache
def dataset(name: str, directory: Path | None) -> Dataset:
    """Load a data set, once in each process."""
    return load(name, directory=directory)
