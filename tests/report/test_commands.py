"""The lines that a report says repeat a run do repeat it."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from advalign.cli import commands as cli
from advalign.data import load
from advalign.objectives import as_method
from advalign.report.commands import evaluate_line, flags_of, train_line
from advalign.runs import Run
from advalign.training import train as training
from advalign.training.planning import plan
from advalign.training.recipes import Recipe, digits, dm, trades

MODEL, RUNS = "small-cnn(width=4)", Path("runs")
QUICK = replace(digits(), epochs=1, steps=1, batch_size=128, subset=256)


def planned(
    method: str, recipe: Recipe, guests: dict[str, str | Path] | None = None, runs: Path = RUNS, name: str | None = None
) -> Run:
    return plan(as_method(method), load("digits"), MODEL, recipe, runs=runs, name=name, guests=guests or {}).run


def repeated(line: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return the run that the line would train."""
    found: list[Run] = []

    def train(method, *, data, model, recipe, guests, runs, name, **_):
        assert (data, model) == ("digits", MODEL)
        found.append(planned(method, recipe, guests, runs, name))
        return replace(found[0], path=Path("nowhere"))  # not finished: nothing more is printed

    monkeypatch.setattr(training, "train", train)
    cli.main(shlex.split(line, comments=True)[1:])
    return found[0]


@pytest.mark.parametrize(
    ("method", "recipe"),
    [
        ("trades+vfd(weight=0.1)", digits()),
        ("natural", replace(digits(), lr=0.123456789, nesterov=False)),
        ("at", Recipe(norm="l2", eps=0.5, milestones=(0.3, 1), average="ema", validation=97, clip_norm=1.5, seed=7)),
        ("hat+lbgat+vfd", trades()),
        ("at", replace(digits(), attack="atta(reset=3)", guard=False)),
        ("trades", replace(digits(), steps="2:5:10", guard=True)),
        ("afa", replace(dm(), batch_size=64, compile=True, start=None, precision="bf16", step_size=0.04 / 3)),
    ],
)
def test_the_line_trains_the_same_run(method: str, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = planned(method, recipe)
    line = train_line(run, {})
    again = repeated(line, monkeypatch)
    assert again.id == run.id
    assert again.path == run.path
    assert "#" not in line


@pytest.mark.slow
def test_a_guest_that_was_given_is_named_by_its_folder_or_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    vanilla = training.train("natural", data="digits", model=MODEL, recipe=QUICK, runs="elsewhere", name="its own")
    run = planned("trades+vfd", digits(), {"vanilla": vanilla.path}, name="mine")
    line = train_line(run, {vanilla.id: vanilla.path})
    assert repeated(line, monkeypatch).id == run.id
    assert repeated(line, monkeypatch).path == run.path
    missing = train_line(run, {})
    assert f"# VANILLA: the run or weights file with digest {vanilla.id}" in missing
    assert "--vanilla VANILLA" in missing


def test_what_a_folder_does_not_tell_is_said():
    setting = json.loads(json.dumps(dict(planned("at", digits()).setting)))
    setting["extra"] = "0123"
    del setting["recipe"]["label_smoothing"]
    line = train_line(Run(Path("runs/x"), setting), {})
    assert line.count("\n#") + line.startswith("#") == 2
    assert "earlier version" in line
    assert "EXTRA.npz: the generated images with digest 0123" in line


def test_flags_leave_out_what_a_method_does_not_use():
    assert "steps" not in flags_of(planned("natural", digits()).setting)
    flags = flags_of(planned("at", digits()).setting)
    assert flags["steps"] == "7"
    assert flags["eps"] == "0.2"
    assert "seed" not in flags


@pytest.mark.slow
def test_the_line_measures_the_same_outcomes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run = training.train("at", data="digits", model=MODEL, recipe=QUICK)
    other = training.train("at", data="digits", model=MODEL, recipe=replace(QUICK, seed=1))
    options = ["--n", "50", "--eps", "0.1", "--batch-size", "16", "--seed", "3", "--checkpoint", "last"]
    cli.main(["evaluate", str(run.path), "--attacks", "fgsm", 'pgd(steps=2, loss="margin")', *options])
    cli.main(["evaluate", str(run.path), "--attacks", "fgsm", "--surrogate", str(other.path), "--n", "50"])
    files = sorted((run.path / "evaluations").glob("*.json"))
    assert len(files) == 2
    for file in files:
        before = json.loads(file.read_text())
        line = evaluate_line(run, before, {other.id: other.path})
        file.unlink()
        cli.main(shlex.split(line)[1:])
        assert json.loads(file.read_text())["outcomes"] == before["outcomes"]
    assert "--surrogate SURROGATE" in evaluate_line(run, json.loads(files[0].read_text()), {}) + evaluate_line(
        run, json.loads(files[1].read_text()), {}
    )
