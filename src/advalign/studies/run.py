"""A study as a verb: plan it, run what is not finished, and write the results after every cell."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from advalign.errors import UserError, require, unknown
from advalign.runtime.device import one_thread, pick_device
from advalign.runtime.files import require_folder, require_writable
from advalign.runtime.interrupts import stoppable
from advalign.runtime.progress import say
from advalign.studies.context import ExecutionContext, Outcome
from advalign.studies.execute import run_locally
from advalign.studies.job import Job
from advalign.studies.planning import plan_jobs
from advalign.studies.progress import Progress
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
    """Run what is not finished of a study, and write its results after every cell into `out`.

    Failed cells are shown as failed, and the next call tries them again. SIGTERM, Ctrl-C and the time budget stop the
    study with everything saved; the same call resumes it.

    Args:
        seeds: number of training seeds; the study's own if None.
        runs: folder of the run folders, which studies share.
        out: folder of the results; `studies/NAME` if None.
        executor: `local`, one job after another, or `ray`, as many at once as have room.
        gpus: with Ray, the share of a GPU for each job; a whole one, if the cluster has any, if None.
        plugins: the user's own plug-ins that methods name, as `package.module:Class`.

    Raises:
        UserError: anything that cannot work, before anything is trained.
    """
    console = console or Console(quiet=True)
    check_executor(executor, gpus)
    pick_device(device)
    deadline = None if time_budget is None else time.time() + time_budget
    context = ExecutionContext(device, None if data_dir is None else Path(data_dir), deadline, tuple(plugins))
    say(console, study.title)
    with one_thread() if study.one_thread else nullcontext():
        results = plan_study(study, seeds=seeds, runs=runs, out=out, context=context)
        for folder in (results.progress.out, Path(runs)):
            require_writable(folder)
        stopped = _run_open_jobs(results, executor, gpus, console)
        results.write(figures=not stopped or context.left != 0)
    if stopped:
        say(console, f"Stopped: {stopped}. The same command goes on.")
    return results


def _run_open_jobs(results: Results, executor: str, gpus: float | None, console: Console) -> str:
    """Run the jobs that are not finished; return why they stopped before the end, or the empty string."""
    open_jobs = [job for job in results.jobs if not job.finished]
    say(console, f"{len(results.jobs) - len(open_jobs)} of {len(results.jobs)} cells were finished before")
    remaining, context = {job.run.id for job in open_jobs}, results.progress.context

    def watch(job: Job, outcome: Outcome) -> None:
        results.failures.pop(job.run.id, None)
        if outcome.status == "failed":
            results.failures[job.run.id] = outcome.reason
        remaining.discard(job.run.id)
        if not remaining:  # the results are written at the end anyway
            return
        try:
            with stoppable():
                results.write()
        except UserError as error:  # such as a full disk: the runs' own folders may have room
            say(console, str(error))

    try:
        if executor == "ray":
            from advalign.studies.on_ray import run_on_ray

            return run_on_ray(open_jobs, context, gpus, console, watch)
        return run_locally(open_jobs, context, console, watch)
    except KeyboardInterrupt as stop:  # while the results were being drawn
        return str(stop) or "SIGINT arrived"


def plan_study(
    study: Study, *, seeds: int | None, runs: str | Path, out: str | Path | None, context: ExecutionContext
) -> Results:
    """Return a study with its jobs planned, and nothing run.

    Raises:
        UserError: as `run_study`.
    """
    folder = Path("studies") / study.name if out is None else Path(out)
    require_folder(folder)
    jobs = plan_jobs(study, study.seeds if seeds is None else seeds, runs=Path(runs), data_dir=context.data_dir)
    results = Results(study, Progress(study.cells, tuple(jobs), context, folder))
    failures = results.read_failures()
    open_ids = {job.run.id for job in results.jobs if not job.finished}
    results.failures.update({run: reason for run, reason in failures.items() if run in open_ids})
    return results


def check_executor(executor: str, gpus: float | None) -> None:
    """Refuse an unknown executor, or a share of a GPU that it cannot use.

    Raises:
        UserError: an unknown executor, a share that is not positive, or a share without Ray.
    """
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    require(gpus is None or gpus > 0, lambda: f"gpus={gpus} must be above 0")
    require(
        gpus is None or executor == "ray", lambda: f"gpus={gpus} is for executor ray, and the executor is {executor}"
    )
