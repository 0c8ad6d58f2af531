"""A study as a verb: lay it out, carry out what is not done, and write the results after every cell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from advalign.errors import UserError, require, unknown
from advalign.runtime.device import pick_device
from advalign.runtime.files import require_folder, require_writable
from advalign.runtime.interrupts import stoppable
from advalign.runtime.progress import say
from advalign.studies.context import ExecutionContext, Outcome
from advalign.studies.execute import run_locally
from advalign.studies.job import Job, plan_jobs
from advalign.studies.results import Results
from advalign.studies.study import Study

EXECUTORS = ("local", "ray")


def run_study(
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
    plugins: Sequence[str] = (),
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
        plugins: `package.module:Class` of those of one's own that methods name.
        gpus: with Ray, the share of a GPU for each cell; one where the cluster has any, if not given.

    Raises:
        UserError: anything that cannot work, before anything is trained.
    """
    console = console or Console(quiet=True)
    check_executor(executor, gpus)
    pick_device(device)
    deadline = None if time_budget is None else time.time() + time_budget
    context = ExecutionContext(device, None if data_dir is None else Path(data_dir), deadline, tuple(plugins))
    say(console, study.title)
    results = plan_study(study, seeds=seeds, runs=runs, out=out, context=context)
    for folder in (results.out, Path(runs)):
        require_writable(folder)
    todo = [job for job in results.jobs if not job.finished]
    say(console, f"{len(results.jobs) - len(todo)} of {len(results.jobs)} cells were finished before")

    def watch(job: Job, outcome: Outcome) -> None:
        results.failures.pop(job.run.id, None)
        if outcome.status == "failed":
            results.failures[job.run.id] = outcome.reason
        try:
            with stoppable():
                results.write()
        except UserError as error:  # such as a full disk: the cells' own folders may have room
            say(console, str(error))

    try:
        if executor == "ray":
            from advalign.studies.on_ray import on_ray

            stopped = on_ray(todo, context, gpus, console, watch)
        else:
            stopped = run_locally(todo, context, console, watch)
    except KeyboardInterrupt as stop:  # while the results were being drawn
        stopped = str(stop) or "SIGINT arrived"
    results.write(figures=not stopped or context.left != 0)
    if stopped:
        say(console, f"Stopped: {stopped}. The same command goes on.")
    return results


def plan_study(
    study: Study, *, seeds: int | None, runs: str | Path, out: str | Path | None, context: ExecutionContext
) -> Results:
    """Return a study with its jobs planned and nothing done.

    Raises:
        UserError: as `run_study`.
    """
    folder = Path("studies") / study.name if out is None else Path(out)
    require_folder(folder)
    jobs = plan_jobs(study, study.seeds if seeds is None else seeds, runs=Path(runs), data_dir=context.data_dir)
    results = Results(study, tuple(jobs), context, folder)
    before = results.failures_before()
    open_ids = {job.run.id for job in results.jobs if not job.finished}
    results.failures.update({run: reason for run, reason in before.items() if run in open_ids})
    return results


def check_executor(executor: str, gpus: float | None) -> None:
    """Refuse what no executor is, or does.

    Raises:
        UserError: an unknown executor, or a share of a GPU that is none or has nobody to heed it.
    """
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    require(gpus is None or gpus > 0, lambda: f"gpus={gpus} must be above 0")
    require(
        gpus is None or executor == "ray", lambda: f"gpus={gpus} is for executor ray, and the executor is {executor}"
    )
