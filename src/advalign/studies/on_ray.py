"""Studies on a cluster: training a run is one Ray task, after its guests; measuring it another.

Runs and data must be in folders that every machine sees under one path. If a machine is lost, another one takes its
task, where the run resumes from its last saved state; training locks each run's folder, so that no two tasks train the
same run. An extra: `pip install 'advalign[ray]'`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from advalign.errors import UserError, require
from advalign.registration import register
from advalign.runtime.interrupts import stoppable
from advalign.runtime.progress import format_duration, say
from advalign.studies.context import ExecutionContext, Outcome
from advalign.studies.execute import BUSY_SECONDS, Watcher, run_job
from advalign.studies.job import Job

RETRIES = 3
"""How often a task moves to another machine."""


def run_on_ray(
    jobs: Sequence[Job], context: ExecutionContext, gpus: float | None, console: Console, watch: Watcher
) -> str:
    """Run the jobs on the cluster that `RAY_ADDRESS` names, or else on this machine: as many at once as have room.

    Returns:
        Why the jobs stopped before the end, or the empty string.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise UserError("Ray is not installed: pip install 'advalign[ray]'") from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False)
    task = ray.remote(num_cpus=1, num_gpus=_share(ray, gpus), max_retries=RETRIES)(_work)
    context = replace(context, data_dir=None if context.data_dir is None else context.data_dir.absolute())
    training: dict[Path, Any] = {}  # by the run's folder

    def trained(job: Job) -> Any:
        """Return the task that trains a run, which begins once its guests are trained; no run has two."""
        if job.run.path not in training:
            guests = [trained(guest) for guest in job.guests if not guest.run.finished]
            training[job.run.path] = task.remote(_absolute(replace(job, columns=())), context, *guests)
        return training[job.run.path]

    def measured(job: Job) -> Any:
        surrogate = [] if job.surrogate is None else [job.surrogate]
        needed = [trained(each) for each in (job, *surrogate) if not each.run.finished]
        return task.remote(_absolute(job), context, *needed)

    start, reason, waiting = time.monotonic(), "", dict[Any, Job]()
    try:
        with stoppable():
            waiting = {measured(job): job for job in jobs}
            while waiting and not reason:
                ready, _ = ray.wait(list(waiting), timeout=context.left)
                if not ready:
                    reason = "the time budget is used up"
                    break
                (done,) = ready
                job, outcome = waiting.pop(done), _outcome(ray, done)
                if outcome.status == "stopped":
                    reason = outcome.reason
                    break
                if outcome.status == "busy":
                    for each in (job, *job.guests, *([job.surrogate] if job.surrogate is not None else [])):
                        training.pop(each.run.path, None)
                    time.sleep(BUSY_SECONDS)
                    waiting[measured(job)] = job
                    continue
                k = len(jobs) - len(waiting)
                eta = (
                    f", about {format_duration((time.monotonic() - start) / k * len(waiting))} left" if waiting else ""
                )
                say(console, f"cell {k} of {len(jobs)}: {job.name} {outcome.status} {outcome.reason}{eta}")
                watch(job, outcome)
    except KeyboardInterrupt as stop:
        reason = str(stop) or "SIGINT arrived"
    if reason:  # as by Ctrl-C: training saves its state and ends
        _cancel(ray, [*training.values(), *waiting])
    if started_here:
        ray.shutdown()
    return reason


def _share(ray: Any, gpus: float | None) -> float:
    """Return the share of a GPU for each task; by default a whole one, if the cluster has any."""
    available = ray.cluster_resources().get("GPU", 0.0)
    gpus = min(1.0, available) if gpus is None else gpus
    require(gpus <= available, lambda: f"gpus={gpus:g} a cell, and the cluster has {available:g}")
    return gpus


def _cancel(ray: Any, tasks: Sequence[Any]) -> None:
    for each in tasks:
        ray.cancel(each)
    ray.wait(list(tasks), num_returns=len(tasks), timeout=60)


def _work(job: Job, context: ExecutionContext, *needed: Outcome) -> Outcome:
    """Run a job in a worker, once Ray has run `needed`; a guest that failed fails here again with its reason."""
    for spelling in context.plugins:
        register(spelling)
    return run_job(job, context, Console(quiet=True))


def _outcome(ray: Any, done: Any) -> Outcome:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:  # the machine is lost, or the process was killed
        return Outcome("failed", f"{type(error).__name__}: {error}".splitlines()[0])


def _absolute(job: Job) -> Job:
    """Return the job with absolute paths, since a worker runs in another folder."""
    surrogate = None if job.surrogate is None else _absolute(job.surrogate)
    return replace(job, run=replace(job.run, path=job.run.path.absolute()), surrogate=surrogate)
