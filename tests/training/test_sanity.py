"""Is the network any good at all? A teacher before it teaches, a student after its training."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from advalign.cli import commands as cli
from advalign.data import load
from advalign.errors import TrainingError, UserError
from advalign.models import build
from advalign.objectives import parse
from advalign.runs import Run
from advalign.runs import load as load_run
from advalign.training.planning import plan
from advalign.training.recipes import Recipe, digits
from advalign.training.sanity import judge
from advalign.training.train import train

MODEL = "small-cnn(width=4)"
QUICK = replace(digits(), epochs=1, steps=1, subset=128)
GOOD = replace(digits(), epochs=4, steps=1, subset=512)
BAD = replace(QUICK, epochs=2, lr=1e3)
"""A rate at which the loss explodes, to finite numbers."""


def quick(method: str, folder: Path, recipe: Recipe = QUICK, **options) -> tuple[Run, str]:
    said = StringIO()
    console = Console(file=said, width=400)
    run = train(
        method, data="digits", model=MODEL, recipe=recipe, runs=folder, device="cpu", console=console, **options
    )
    return run, said.getvalue()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return quick("natural", tmp_path_factory.mktemp("good"), GOOD)[0]


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(build(MODEL, classes=10, channels=1).state_dict(), tmp_path / "untrained.pt")
    return tmp_path / "untrained.pt"


def test_a_given_guest_is_measured_once_before_it_teaches(good: Run, tmp_path: Path):
    run, said = quick("at+vfd", tmp_path, guests={"vanilla": good.path})
    validation = plan(parse("at"), load("digits"), MODEL, QUICK, runs=tmp_path, guests={}).images[1]
    right = (load_run(good.path)(validation.floats()).argmax(1) == validation.labels).double().mean()
    (line,) = (line for line in said.splitlines() if "vanilla model" in line)
    accuracy = f"clean accuracy {100 * right:.1f} % on 150 validation images"
    assert line == f"the vanilla model, {good.weights('best')}: {accuracy}"
    assert said.index(line) < said.index("epoch ")
    assert run.finished
    assert "vanilla model" not in quick("at+vfd", tmp_path, guests={"vanilla": good.path})[1]


@pytest.mark.parametrize(("method", "guest"), [("at+vfd", "vanilla"), ("rslad", "robust"), ("trades+lbgat", "guide")])
def test_an_untrained_guest_is_refused_before_any_work_unless_allowed(
    method: str, guest: str, untrained: Path, tmp_path: Path
):
    guests = {guest: untrained}
    with pytest.raises(
        UserError, match=rf"the {guest} model, .*untrained.pt: .*better than always .*--allow-weak-guest"
    ):
        quick(method, tmp_path / "runs", guests=guests)
    assert not (tmp_path / "runs").exists()
    run, said = quick(method, tmp_path / "runs", guests=guests, allow_weak_guest=True)
    assert run.finished
    assert f"warning: the {guest} model" in said


def test_of_two_guests_the_given_one_is_measured_before_the_other_is_trained(untrained: Path, tmp_path: Path):
    with pytest.raises(UserError, match="the robust model"):
        quick("mtard", tmp_path / "runs", guests={"robust": untrained})
    assert not (tmp_path / "runs").exists()


def test_a_guest_that_is_trained_first_is_measured_and_teaches_whatever_it_is_worth(tmp_path: Path):
    run, said = quick("at+vfd", tmp_path, replace(QUICK, lr=1e-9))
    assert run.finished
    (line,) = (line for line in said.splitlines() if "the vanilla model" in line)
    assert line.startswith("warning: the vanilla model, ")
    assert "better than always answering the largest class" in line


def test_a_training_that_diverges_is_kept_and_marked_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = ["train", "natural", "--data", "digits", "--model", MODEL, "--recipe", "digits", "--epochs", "2"]
    words += ["--subset", "128", "--lr", "1e3", "--runs", str(tmp_path), "--name", "bad", "--device", "cpu"]
    for _ in range(2):  # the same command says it again
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 1
        said = capsys.readouterr()
        assert "Trained" not in said.out
        assert "the training diverged: loss" in said.err
        assert "Try a lower --lr" in said.err
    run = Run.read(tmp_path / "bad")
    assert run.log[-1]["loss"] > 1e3
    assert not run.finished
    assert json.loads((run.path / "run.json").read_text())["status"] == "diverged"
    assert run.warning.startswith("the training diverged")
    cli.main(["evaluate", str(run.path), "--attacks", "none", "-n", "100", "--device", "cpu"])
    said = capsys.readouterr().out
    assert "the training diverged" in said
    assert "not finished" not in said
    assert "better than always answering the largest class" in said


def test_a_diverged_guest_teaches_nobody(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"natural-digits.*the training diverged"):
        quick("at+vfd", tmp_path, BAD)
    assert len(list(tmp_path.iterdir())) == 1


def test_outputs_that_are_not_finite_break_the_training_and_not_the_users_input(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"after epoch \d+, the model's outputs are not finite.*lower --lr"):
        quick("natural", tmp_path, replace(BAD, lr=1e6))


def test_a_student_that_is_no_better_than_one_answer_is_said_to_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, said = quick("natural", tmp_path, replace(QUICK, lr=1e-9))
    assert run.finished
    assert "warning" in said
    assert "not better than always answering the largest class" in run.warning
    words = ["train", "natural", "--data", "digits", "--model", MODEL, "--recipe", "digits", "--epochs", "1"]
    words += ["--subset", "128", "--lr", "1e-9", "--steps", "1", "--runs", str(tmp_path), "--device", "cpu"]
    cli.main(words)
    said = capsys.readouterr().out
    assert "finished before" in said
    assert "warning" in said
    assert "Trained: " not in said


def rows(*accuracies: float, loss: float = 1.0) -> list[dict[str, Any]]:
    return [{"loss": loss, "validation": {"robust": each / 2, "clean": each}} for each in accuracies]


@pytest.mark.parametrize(
    ("log", "warning", "diverged"),
    [
        (rows(0.2, 0.8), "", False),
        ([*rows(0.8), {"loss": 1.0}, *rows(0.3)], "", False),  # the best checkpoint is what everything reads
        (rows(0.3, 0.2), "the best checkpoint has a clean accuracy of 30.0 % on 40 validation images", False),
        (rows(0.8, 0.2, loss=1e13), "the training diverged: loss 1e+13, clean accuracy 20.0 %", True),
        (rows(0.2, 0.8, loss=1e13), "", False),
    ],
)
def test_a_training_is_judged_by_its_best_checkpoint_and_its_end(log: Any, warning: str, diverged: bool):
    labels = torch.arange(40) % 4
    plan: Any = SimpleNamespace(
        run=SimpleNamespace(log=log), images=(None, SimpleNamespace(labels=labels)), dataset=SimpleNamespace(classes=4)
    )
    outcome = judge(plan)
    assert outcome.warning.startswith(warning)
    assert bool(outcome.warning) == bool(warning)
    assert outcome.diverged == diverged


def test_a_good_student_has_no_warning(good: Run):
    assert good.warning == ""
    assert "warning" not in json.loads((good.path / "run.json").read_text())
