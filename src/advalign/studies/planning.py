"""The jobs of a study: every cell with every seed, planned before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from advalign.errors import require
from advalign.objectives import parse
from advalign.studies.cells import Cell
from advalign.studies.job import Job, dataset
from advalign.studies.study import Study, check_seeds
from advalign.training.plan import Plan
from advalign.training.planning import plan


def plan_jobs(study: Study, seeds: int, *, runs: Path, data_dir: Path | None) -> list[Job]:
    """Plan every run of a study, seed by seed in the order in which they are run. Nothing is written.

    Raises:
        UserError: anything that cannot work.
    """
    check_seeds(seeds)
    tried: set[object] = set()  # cells share guests, and another seed needs no other trial
    surrogate = None if study.surrogate is None else _job(study.surrogate, 0, runs, data_dir, tried)
    jobs = [
        replace(
            _job(cell, seed, runs, data_dir, tried),
            columns=tuple(column for column in study.columns if column.data in (None, cell.data)),
            surrogate=surrogate,
        )
        for seed in range(study.first_seed, study.first_seed + seeds)
        for cell in study.in_order
    ]
    for job in jobs:
        require(
            surrogate is None or job.run.path != surrogate.run.path,
            lambda: f"{job.name} is the surrogate itself, so no black box: give the study another surrogate",
        )
    return jobs


def _job(cell: Cell, seed: int, runs: Path, data_dir: Path | None, tried: set[object]) -> Job:
    if seed != cell.recipe.seed:
        cell = replace(cell, recipe=replace(cell.recipe, seed=seed))
    data = dataset(cell.data, data_dir)
    planned = plan(parse(cell.method), data, cell.model, cell.recipe, runs=runs, guests={}, tried=tried)
    return Job(cell, planned.run, len(data.test), data.digest, guests=_guests(planned, cell.data))


def _guests(planned: Plan, data: str) -> tuple[Job, ...]:
    jobs = []
    for guest in (each for each in planned.guests.values() if isinstance(each, Plan)):
        cell = Cell(method=str(guest.method), data=data, model=guest.model, recipe=guest.recipe)
        test_images, digest = len(guest.dataset.test), guest.dataset.digest
        jobs.append(Job(cell, guest.run, test_images, digest, guests=_guests(guest, data)))
    return tuple(jobs)
