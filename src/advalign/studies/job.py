"""A job: one cell of a study with one seed, planned. It knows its run's folder, and what of it is still to be done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from advalign.attacks.names import parse_name
from advalign.data import Dataset, load
from advalign.errors import UserError, require
from advalign.objectives import parse
from advalign.runs import Record, Run
from advalign.studies.study import Cell, Column, Study
from advalign.threats import Threat
from advalign.training.plan import Plan, plan


@dataclass(frozen=True)
class Job:
    """A run to be trained and measured; plain data, that another process can be sent."""

    cell: Cell
    """with the job's seed in its recipe"""
    run: Run
    test_images: int
    images: str
    """digest of the data set"""
    columns: tuple[Column, ...] = ()
    surrogate: Job | None = None
    guests: tuple[Job, ...] = ()
    """what training makes first where it is not there yet"""

    @property
    def name(self) -> str:
        """What the job is called on the terminal."""
        return f"{self.cell.row} on {self.cell.data}, seed {self.cell.recipe.seed}"

    @property
    def threat(self) -> Threat:
        """What attacks may do: as in training, also where a natural run was trained against nothing."""
        return self.cell.recipe.threat

    @property
    def trained(self) -> str:
        """How far the training is, in words."""
        return (
            "trained" if self.run.finished else f"trained for {len(self.run.log)} of {self.cell.recipe.epochs} epochs"
        )

    @property
    def finished(self) -> bool:
        """Whether the run is trained and every column measured; not, where its files cannot be read."""
        try:
            return self.run.finished and not self.missing()
        except UserError:
            return False

    def n(self, column: Column) -> int:
        """Return how many test images the column is measured on."""
        return min(column.n or self.test_images, self.test_images)

    def records(self) -> dict[Column, Record]:
        """Return what was measured so far; of two records in one place the later.

        Raises:
            UserError: the run's records are damaged.
        """
        found = {}
        for record in self.run.records:
            for column in self.columns:
                if self._is_of(record, column):
                    found[column] = record
        return found

    def missing(self) -> list[Column]:
        """Return the columns that are not measured yet."""
        found = self.records()
        return [column for column in self.columns if column not in found]

    def _is_of(self, record: Record, column: Column) -> bool:
        measured = (record.checkpoint, record.threat, record.n, record.precision, record.attack_seed)
        if measured != ("best", str(self.threat), self.n(column), "fp32", 0):
            return False
        if (record.epochs, record.images) != (self.cell.recipe.epochs, self.images):  # half-trained, or on other data
            return False
        if not column.black_box:
            return record.attack == column.attack
        made_on = "" if self.surrogate is None else self.surrogate.run.id
        name = parse_name(record.attack)
        return name.attack == column.attack and name.surrogate.endswith(f" {made_on}")


@cache
def dataset(name: str, directory: Path | None) -> Dataset:
    """Load a data set, once in a process."""
    return load(name, directory=directory)


def plan_jobs(study: Study, seeds: int, *, runs: Path, data_dir: Path | None) -> list[Job]:
    """Plan every run of a study, in the order in which they are to be done: seed by seed. Nothing is written.

    Raises:
        UserError: anything that cannot work.
    """
    require(seeds >= 1, lambda: f"seeds={seeds} must be at least 1")
    tried: set[object] = set()  # many cells share guests, and methods differ between seeds in nothing that is tried
    surrogate = None if study.surrogate is None else _job(study.surrogate, 0, runs, data_dir, tried)
    jobs = [
        replace(
            _job(cell, seed, runs, data_dir, tried),
            columns=tuple(column for column in study.columns if column.data in (None, cell.data)),
            surrogate=surrogate,
        )
        for seed in range(seeds)
        for cell in study.in_order
    ]
    for job in jobs:
        itself = surrogate is not None and job.run.path == surrogate.run.path
        require(
            not itself, lambda: f"{job.name} is the surrogate itself, so no black box: give the study another surrogate"
        )
    return jobs


def _job(cell: Cell, seed: int, runs: Path, data_dir: Path | None, tried: set[object]) -> Job:
    cell = replace(cell, recipe=replace(cell.recipe, seed=seed))
    data = dataset(cell.data, data_dir)
    planned = plan(parse(cell.method), data, cell.model, cell.recipe, runs=runs, guests={}, tried=tried)
    return Job(cell, planned.run, len(data.test), data.digest, guests=_guests(planned, cell.data))


def _guests(planned: Plan, data: str) -> tuple[Job, ...]:
    jobs = []
    for guest in (each for each in planned.guests.values() if isinstance(each, Plan)):
        cell = Cell(method=str(guest.method), data=data, model=guest.model, recipe=guest.recipe)
        made = guest.dataset
        jobs.append(Job(cell, guest.run, len(made.test), made.digest, guests=_guests(guest, data)))
    return tuple(jobs)
