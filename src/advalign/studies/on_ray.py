"""Studies on a cluster: each run a Ray task with its share of a GPU, after the guests it needs.

Runs and data must be in folders that every machine sees under one path. A task that is lost with its machine is given
to another, where the run goes on from its last saved state; training holds each run's folder, so no run is made twice
at a time. An extra: `pip install 'advalign[ray]'`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from advalign.errors import UserError
from advalign.interrupts import stoppable
from advalign.studies.execute import Outcome, Place, Watcher, carry_out, spelled
from advalign.studies.job import Job
from advalign.terminal import say

RETRIES = 3
"""How often a task is given to another machine."""


def on_ray(jobs: Sequence[Job], place: Place, gpus: float | None, console: Console, watch: Watcher) -> str:
    """Carry the jobs out on the cluster that `RAY_ADDRESS` names, or else on this machine: as many as have room.

    Returns:
        Why it stopped before the end, or the empty string.

    Raises:
        UserError: Ray is not installed.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError:
        raise UserError("Ray is not installed: pip install 'advalign[ray]'") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    if gpus is None:
        gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_work)
    place = replace(place, data_dir=None if place.data_dir is None else place.data_dir.absolute())
    under_way: dict[Path, Any] = {}  # by the run's folder

    def submit(job: Job) -> Any:
        """Return the job's task, which begins when the runs it needs are there; none is submitted twice."""
        if job.run.path not in under_way:
            needed = [*job.guests, *([job.surrogate] if job.surrogate is not None else [])]
            waits = [submit(by_run.get(each.run.path, each)) for each in needed if not each.run.finished]
            under_way[job.run.path] = task.remote(_absolute(job), place, *waits)
        return under_way[job.run.path]

    by_run = {job.run.path: job for job in jobs}
    began, reason = time.monotonic(), ""
    try:
        with stoppable():
            waiting = {submit(job): job for job in jobs}
            while waiting and not reason:
                (done, *_), _ = ray.wait(list(waiting))
                job, outcome = waiting.pop(done), _outcome(ray, done)
                if outcome.status == "stopped":
                    reason = outcome.reason
                    break
                k = len(jobs) - len(waiting)
                eta = f", about {spelled((time.monotonic() - began) / k * len(waiting))} left" if waiting else ""
                say(console, f"cell {k} of {len(jobs)}: {job.name} {outcome.status} {outcome.reason}{eta}")
                watch(job, outcome)
    except KeyboardInterrupt as stop:
        reason = str(stop) or "SIGINT arrived"
    if reason:  # as Ctrl-C would: training saves its state and ends
        for each in under_way.values():
            ray.cancel(each)
        ray.wait(list(under_way.values()), num_returns=len(under_way), timeout=60)
    if ours:
        ray.shutdown()
    return reason


def _work(job: Job, place: Place, *needed: Outcome) -> Outcome:
    """Carry a job out in a worker; `needed` makes Ray wait, and a guest that has failed fails again with its reason."""
    return carry_out(job, place, Console(quiet=True))


def _outcome(ray: Any, done: Any) -> Outcome:
    try:
        return ray.get(done)
    except ray.exceptions.RayError as error:  # the machine is lost for good, or the process was killed
        return Outcome("failed", f"{type(error).__name__}: {error}".splitlines()[0])


def _absolute(job: Job) -> Job:
    """Return the job with its folder's whole path, since a worker runs elsewhere."""
    surrogate = None if job.surrogate is None else _absolute(job.surrogate)
    return replace(job, run=replace(job.run, path=job.run.path.absolute()), surrogate=surrogate)
