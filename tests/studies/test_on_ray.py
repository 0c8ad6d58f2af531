"""Studies on a local Ray of two processes: the same records as one after another, guests once, a failure shown."""

from __future__ import annotations

import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from advalign.errors import UserError
from advalign.objectives import PLUGINS
from advalign.registration import register
from advalign.studies import Cell, Column, Study, on_ray, run_study
from advalign.studies.context import ExecutionContext, Outcome
from advalign.studies.job import Job
from advalign.studies.planning import plan_jobs
from advalign.training.recipes import digits

RECIPE = replace(digits(), epochs=1, steps=1, subset=256, batch_size=128)


def cell(method: str, lr: float = RECIPE.lr, width: int = 4) -> Cell:
    return Cell(
        method=method, data="digits", model=f"small-cnn(width={width})", recipe=replace(RECIPE, lr=lr),
        row=method if lr == RECIPE.lr else "too fast",
    )  # fmt: skip


STUDY = Study(
    name="toy",
    title="Toy",
    cells=(cell("trades+kd"), cell("trades"), cell("at", lr=1e30)),
    columns=(Column(heading="clean"), Column(heading="black box", attack="fgsm", black_box=True)),
    surrogate=cell("natural", width=8),
)


def test_without_ray_one_line_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"Ray is not installed: pip install 'advalign\[ray\]'"):
        run_study(STUDY, runs=tmp_path / "runs", out=tmp_path / "out", device="cpu", executor="ray")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_two_workers_give_the_records_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        there = run_study(STUDY, runs=tmp_path / "ray", out=tmp_path / "out", device="cpu", executor="ray")
        stopped = run_study(
            STUDY, runs=tmp_path / "stopped", out=tmp_path / "stop", device="cpu", executor="ray", time_budget=0.01
        )
    finally:
        ray.shutdown()
    here = run_study(STUDY, runs=tmp_path / "local", out=tmp_path / "here", device="cpu")
    assert [(r.method, r.attack, r.accuracy) for r in there.records()] == [
        (r.method, r.attack, r.accuracy) for r in here.records()
    ]
    assert [job.finished for job in there.jobs] == [True, True, False]
    assert there.table() == here.table()
    assert {path.name for path in (tmp_path / "ray").iterdir()} == {
        path.name for path in (tmp_path / "local").iterdir()
    }
    assert stopped.records() == []


FRAGILE = """
import os, signal
from pathlib import Path
from advalign import PlugIn

class Fragile(PlugIn):
    name = "fragile"

    def __init__(self):
        super().__init__()
        if os.environ.get("RAY_JOB_ID") or "ray" in Path("/proc/self/cmdline").read_text():
            mark = Path(__file__).with_name("was-lost")
            if not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

    def terms(self, outs, y):
        return {}
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Ray's own
def test_a_worker_that_is_lost_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Killed without a word, as with its machine; here Ray is started by the study, and the plug-in is one's own."""
    pytest.importorskip("ray")
    (tmp_path / "fragile_parts.py").write_text(FRAGILE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("PYTHONWARNINGS", "default")
    monkeypatch.syspath_prepend(str(tmp_path))
    register("fragile_parts:Fragile")
    try:
        study = replace(STUDY, cells=(cell("at+fragile"),), columns=STUDY.columns[:1], surrogate=None)
        done = run_study(
            study, runs=tmp_path / "runs", out=tmp_path / "out", device="cpu", executor="ray",
            plugins=["fragile_parts:Fragile"],
        )  # fmt: skip
    finally:
        del PLUGINS["fragile"]
    assert (tmp_path / "was-lost").exists()
    assert [job.finished for job in done.jobs] == [True]


class Lost(Exception):
    """A worker that is gone, as Ray reports it once it has tried a task often enough."""


class SimulatedRay:
    """As much of Ray as the executor uses: many workers, each a thread; every third task loses its first worker.

    Of the lost workers every other one has done its task before, and nobody learns which.
    """

    exceptions = SimpleNamespace(RayError=Lost)

    def __init__(self, workers: int) -> None:
        self.pool, self.started, self.lost, self.lock = ThreadPoolExecutor(workers), 0, 0, threading.Lock()

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {}

    def remote(self, *, max_retries: int, **_: Any) -> Callable[..., Any]:
        return lambda function: SimpleNamespace(remote=lambda *args: self._start(function, args, max_retries))

    def _start(self, function: Callable[..., Any], args: tuple[Any, ...], retries: int) -> Future[Any]:
        with self.lock:
            self.started += 1
            loses = self.started % 3 == 0

        def run() -> Any:
            needed = [each.result() if isinstance(each, Future) else each for each in args]
            if loses:
                with self.lock:
                    self.lost += 1
                    dies_late = self.lost % 2
                assert retries
                if dies_late:  # what it has done is done
                    function(*needed)
            return function(*needed)

        return self.pool.submit(run)

    def wait(self, tasks: list[Future[Any]], timeout: float | None = None) -> tuple[list[Future[Any]], list[Any]]:
        done, _ = wait(tasks, timeout, FIRST_COMPLETED)
        return list(done)[:1], []

    def get(self, task: Future[Any]) -> Any:
        return task.result()


@pytest.mark.slow
def test_of_200_workers_a_third_is_lost_and_every_cell_is_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The jobs are short ones; what they leave is counted: a line for each cell, and for each guest, and no second."""
    simulated, work, lock = SimulatedRay(200), Counter[str](), threading.Lock()

    def short(job: Job, context: ExecutionContext, console: Console) -> Outcome:
        done = job.run.path / ("trained" if not job.columns else "measured")
        with lock:  # as training and measuring lock a run's folder
            job.run.path.mkdir(parents=True, exist_ok=True)
            if not done.exists():
                done.touch()
                work[f"{job.run.path.name} {done.name}"] += 1
        return Outcome("finished")

    monkeypatch.setitem(sys.modules, "ray", simulated)
    monkeypatch.setattr("advalign.studies.on_ray.run_job", short)
    cells = tuple(
        replace(cell("at" if k % 2 else "trades+vfd"), row=str(k), recipe=replace(RECIPE, weight_decay=1e-6 * k))
        for k in range(300)
    )
    jobs = plan_jobs(replace(STUDY, cells=cells), 1, runs=tmp_path, data_dir=None)
    ended = Counter[str]()

    def watch(job: Job, outcome: Outcome) -> None:
        ended[f"{job.run.id} {outcome.status}"] += 1

    reason = on_ray.run_on_ray(jobs, ExecutionContext("cpu"), None, Console(quiet=True), watch)
    assert reason == ""
    assert ended == {f"{job.run.id} finished": 1 for job in jobs}
    measured = {name for name in work if name.endswith("measured")}
    assert len(measured) == 300
    assert set(work.values()) == {1}
    guests = {guest.run.path.name for job in jobs for guest in job.guests}
    assert {name.split()[0] for name in work} == {job.run.path.name for job in jobs} | guests | {
        jobs[0].surrogate.run.path.name  # pyright: ignore[reportOptionalMemberAccess]
    }
    assert simulated.started == len(work)  # no run is trained or measured by two tasks
    assert simulated.lost == simulated.started // 3 > len(jobs) // 3
