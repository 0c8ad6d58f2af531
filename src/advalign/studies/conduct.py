"""A study as a verb: lay it out, carry out what is not done, and write the results after every cell."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from advalign.errors import require, unknown
from advalign.runs.files import require_folder
from advalign.runtime import pick_device
from advalign.studies.execute import Outcome, Place, locally
from advalign.studies.job import Job, lay_out
from advalign.studies.results import Results
from advalign.studies.study import Study
from advalign.terminal import say

EXECUTORS = ("local", "ray")


def conduct(
    study: Study,
    *,
    seeds: int | None = None,
    runs: str | Path = "runs",
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    time_budget: float | None = None,
    executor: str = "local",
    gpus: float | None = None,
    console: Console | None = None,
) -> Results:
    """Carry out what of a study is not done yet, and write its results after every cell, into `out`.

    Cells that fail are shown as failed, and are tried again by the next call. SIGTERM, Ctrl-C and the time budget stop
    in good order; the same call goes on.

    Args:
        seeds: how many, from 0 on; the study's own number if not given.
        runs: folder of the run folders, which studies share.
        out: folder of the results; `studies/NAME` if not given.
        executor: `local`, one after another, or `ray`, each where there is room.
        gpus: with Ray, the share of a GPU for each cell; one where the cluster has any, if not given.

    Raises:
        UserError: anything that cannot work, before anything is trained.
    """
    console = console or Console(quiet=True)
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    require(gpus is None or (executor == "ray" and gpus > 0), f"gpus={gpus} is above 0, and for executor ray alone")
    pick_device(device)
    deadline = None if time_budget is None else time.time() + time_budget
    place = Place(device, None if data_dir is None else Path(data_dir), deadline)
    results = laid_out(study, seeds=seeds, runs=runs, out=out, place=place)
    todo = [job for job in results.jobs if not job.finished]
    say(console, f"{study.title}: {len(results.jobs) - len(todo)} of {len(results.jobs)} cells were finished before")

    def watch(job: Job, outcome: Outcome) -> None:
        if outcome.status == "failed":
            results.failures[job.run.id] = outcome.reason
        results.write()

    if executor == "ray":
        from advalign.studies.on_ray import on_ray

        stopped = on_ray(todo, place, gpus, console, watch)
    else:
        stopped = locally(todo, place, console, watch)
    results.write()
    if stopped:
        say(console, f"Stopped: {stopped}. The same command goes on.")
    return results


def laid_out(study: Study, *, seeds: int | None, runs: str | Path, out: str | Path | None, place: Place) -> Results:
    """Return a study with its jobs planned and nothing done.

    Raises:
        UserError: as `conduct`.
    """
    folder = Path("studies") / study.name if out is None else Path(out)
    require_folder(folder)
    jobs = lay_out(study, study.seeds if seeds is None else seeds, runs=Path(runs), data_dir=place.data_dir)
    return Results(study, tuple(jobs), place, folder)
