"""Studies on a local Ray of two processes: the same records as one after another, guests once, a failure shown."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from advalign.errors import UserError
from advalign.objectives import PLUGINS
from advalign.registration import register
from advalign.studies import Cell, Column, Study, run_study
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
