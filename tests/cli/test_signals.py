"""Commands that a signal stops: one line that says how to go on, and what was done is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from advalign.cli import commands as cli
from advalign.evaluation import diagnose_source, evaluator, state
from advalign.runs import Run
from advalign.training.recipes import Recipe
from advalign.training.train import train

RECIPE = Recipe(epochs=1, steps=1, batch_size=256, augment="none", eps=0.2, subset=300, validation=50)
EVALUATE = ["--attacks", "pgd(steps=2)", "--batch-size", "10", "-n", "400", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("runs")
    return train("natural", data="digits", model="small-cnn(width=2)", recipe=RECIPE, runs=root, device="cpu")


def stopped(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What standard error says of a command that a signal stops."""
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 130
    return capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_evaluation_goes_on(
    number: signal.Signals,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    command = ["evaluate", str(run.path), *EVALUATE, "--out", str(tmp_path)]
    monkeypatch.setattr(state, "SAVE_SECONDS", -1.0)
    attack_batch, before = evaluator.Evaluator._attack_batch, signal.getsignal(number)

    def attack_and_stop(self, member, current, rows):
        outcome = attack_batch(self, member, current, rows)
        if current.batch == 2:
            os.kill(os.getpid(), number)
        return outcome

    with monkeypatch.context() as stopping:
        stopping.setattr(evaluator.Evaluator, "_attack_batch", attack_and_stop)
        said = stopped(command, capsys)
    line = f"advalign: stopped at once, {number.name} arrived; the same command resumes from what was saved last\n"
    assert said == line
    assert signal.getsignal(number) == before
    assert len(list(tmp_path.glob(".*.state"))) == 1
    cli.main(command)
    assert "resuming an interrupted evaluation" in capsys.readouterr().out
    assert [file.suffix for file in sorted(tmp_path.iterdir())] == [".html", ".json", ".md", ".tex"]


def test_a_stopped_diagnosis_starts_again(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(diagnose_source, "diagnose", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    said = stopped(["diagnose", str(run.path), "-n", "4", "--device", "cpu"], capsys)
    assert said == "advalign: stopped at once, SIGTERM arrived; the same command starts again\n"


def test_ctrl_c_while_the_program_is_being_imported_is_a_line():
    code = """
import sys

class Finder:
    def find_spec(self, name, *_):
        if name == "advalign.cli.commands":
            raise KeyboardInterrupt

sys.meta_path.insert(0, Finder())
from advalign.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "advalign: stopped at once, before anything was done\n")
