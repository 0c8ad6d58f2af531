"""What is measured so far of a study: the records of its jobs, as rows of the table and as curves of figures."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from advalign.errors import UserError
from advalign.report.rows import Row
from advalign.report.sweeps import CurvePoint
from advalign.runs import Record
from advalign.studies.cells import CLEAN, Cell, Column
from advalign.studies.context import ExecutionContext
from advalign.studies.job import Job


@dataclass(frozen=True)
class Progress:
    """The jobs of a study, finished or not; figures are drawn from it."""

    cells: tuple[Cell, ...]
    """in the order of the table"""
    jobs: tuple[Job, ...]
    """in the order in which they are run"""
    context: ExecutionContext
    out: Path
    """folder of the results"""

    @property
    def finished(self) -> bool:
        """Whether every job is finished."""
        return all(job.finished for job in self.jobs)

    @property
    def jobs_of_first_seed(self) -> list[Job]:
        """The jobs of the first seed: one for each cell."""
        return [job for job in self.jobs if job.cell.recipe.seed == self.jobs[0].cell.recipe.seed]

    def measured(self, job: Job) -> dict[Column, Record]:
        """Return the accuracies of a job measured so far; none if its files cannot be read, which running it shows."""
        try:
            return job.records()
        except UserError:
            return {}

    def records(self) -> list[Record]:
        """Return every accuracy measured so far."""
        return [record for job in self.jobs for record in self.measured(job).values()]

    def row(self, name: str) -> Row:
        """Return a row's records, each with its column's heading in place of the attack."""
        measured = [item for job in self.jobs if job.cell.row == name for item in self.measured(job).items()]
        return Row(name, (), tuple(replace(record, attack=column.heading) for column, record in measured))

    def curves(self, robust: str) -> dict[str, list[CurvePoint]]:
        """Return clean accuracy and that of the column `robust` along each curve of the study, as far as measured."""
        curves: dict[str, list[CurvePoint]] = {}
        for cell in self.cells:
            row = self.row(cell.row)
            clean, attacked = row.accuracies(CLEAN), row.accuracies(robust)
            seeds = sorted(clean.keys() & attacked.keys())
            if cell.curve and seeds:
                point = CurvePoint(cell.at, tuple(clean[s] for s in seeds), tuple(attacked[s] for s in seeds))
                curves.setdefault(cell.curve, []).append(point)
        return curves
