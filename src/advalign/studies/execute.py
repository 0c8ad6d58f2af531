"""Running jobs: train what is not trained, measure what is not measured, report failures, resume later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby

from filelock import Timeout
from rich.console import Console

from advalign.attacks.names import worst_case_name
from advalign.errors import Busy, TrainingError, UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.runs import find_weights
from advalign.runtime.interrupts import stoppable
from advalign.runtime.locks import locked
from advalign.runtime.progress import format_duration, say
from advalign.studies.cells import CLEAN, Column
from advalign.studies.context import ExecutionContext, Outcome
from advalign.studies.job import Job, dataset
from advalign.training.train import train

BUSY_SECONDS = 20.0
"""Time until a job is tried again whose run another process holds."""

Watcher = Callable[[Job, Outcome], None]
"""Called after each job that finished or failed."""


def run_job(job: Job, context: ExecutionContext, console: Console) -> Outcome:
    """Train and measure what is not done of one job. A failure of any kind is an outcome, not an exception."""
    try:
        with stoppable():
            _ = job.run.records  # damaged records fail before anything is trained
            _train(job, context, console)
            for n, black_box, columns in _groups_of_missing(job):
                if black_box and job.surrogate is not None:
                    _train(job.surrogate, context, console)
                with stoppable(context.left), _lock_for_measuring(job):
                    _measure(job, n, columns, job.surrogate if black_box else None, context, console)
    except KeyboardInterrupt as stop:
        return Outcome("stopped", str(stop) or "SIGINT arrived")
    except Busy as error:
        return Outcome("busy", str(error))
    except (TrainingError, UserError) as error:
        return Outcome("failed", str(error).removeprefix(f"{job.run.path}: "))
    except Exception as error:  # a study of many runs outlives any of them
        return Outcome("failed", f"{type(error).__name__}: {error}".splitlines()[0])
    return Outcome("finished")


def run_locally(jobs: Sequence[Job], context: ExecutionContext, console: Console, watch: Watcher) -> str:
    """Run the jobs one after another; return why they stopped before the end, or the empty string.

    Jobs whose runs another process holds come after the others, and are waited for at the end.
    """
    start, k, open_jobs = time.monotonic(), 0, list(jobs)
    while open_jobs:
        later = []
        for job in open_jobs:
            eta = f", about {format_duration((time.monotonic() - start) / k * (len(jobs) - k))} left" if k else ""
            say(console, f"cell {k + 1} of {len(jobs)}: {job.name}{eta}")
            outcome = run_job(job, context, console)
            if outcome.status == "stopped":
                return outcome.reason
            if outcome.status == "busy":
                say(console, f"later: {outcome.reason}")
                later.append(job)
                continue
            if outcome.status == "failed":
                say(console, f"failed: {outcome.reason}")
            k += 1
            watch(job, outcome)
        if len(later) == len(open_jobs) and (reason := _wait(context)):
            return reason
        open_jobs = later
    return ""


def _wait(context: ExecutionContext) -> str:
    """Wait a while for another process; return why waiting must end, or the empty string."""
    try:
        with stoppable(context.left):
            time.sleep(BUSY_SECONDS)
    except KeyboardInterrupt as stop:
        return str(stop) or "SIGINT arrived"
    return ""


def _train(job: Job, context: ExecutionContext, console: Console) -> None:
    if job.run.finished:
        return
    if context.left == 0:
        raise KeyboardInterrupt("the time budget is used up")
    run = train(
        job.cell.method, data=dataset(job.cell.data, context.data_dir), model=job.cell.model, recipe=job.cell.recipe,
        runs=job.run.path.parent, device=context.device, time_budget=context.left, console=console,
    )  # fmt: skip
    if not run.finished:  # train has printed why
        raise KeyboardInterrupt("the time budget is used up" if context.left == 0 else "a signal arrived")


def _groups_of_missing(job: Job) -> Iterator[tuple[int, bool, list[Column]]]:
    """Yield the missing columns, in groups that one evaluation measures: of equally many images, made on one model."""

    def key(column: Column) -> tuple[bool, int]:
        return column.black_box, -job.n(column)  # columns of all images are quick and come before the slow attacks

    for (black_box, n), columns in groupby(sorted(job.missing(), key=key), key):
        yield -n, black_box, list(columns)


@contextmanager
def _lock_for_measuring(job: Job) -> Iterator[None]:
    """Hold the run, so that no second process measures it at the same time."""
    try:
        with locked(job.run.path / ".measuring.lock", timeout=0):
            yield
    except Timeout:
        raise Busy(f"{job.run.path} is being measured by another process") from None


def _measure(
    job: Job, n: int, columns: Sequence[Column], surrogate: Job | None, context: ExecutionContext, console: Console
) -> None:
    names = ", ".join(column.heading for column in columns)
    say(console, f"measuring {names} on {n} test images: {job.run.path}")
    target = TargetOptions(
        model=job.cell.model, data=dataset(job.cell.data, context.data_dir), n=None if n == job.test_images else n,
        norm=job.cell.recipe.norm, eps=job.cell.recipe.eps, device=context.device,
    )  # fmt: skip
    measure(
        job.run.path, _attacks_to_run(columns), target, console=console,
        surrogate=None if surrogate is None else find_weights(surrogate.run.path, model=surrogate.cell.model),
    )  # fmt: skip


def _attacks_to_run(columns: Sequence[Column]) -> list[str]:
    """Return the attacks of the columns, without the worst case over all others, which an evaluation adds itself."""
    names = [column.attack for column in columns if column.attack != CLEAN]
    return [name for name in names if name != worst_case_name(other for other in names if other != name)]
