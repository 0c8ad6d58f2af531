"""`advalign study` as it is typed: what it prints and writes, its exit codes, and a signal in the midst."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from advalign.cli import commands as cli

YAML = """
data: digits
model: small-cnn(width=4)
recipe: {{preset: digits, epochs: {epochs}, steps: 1, subset: 256, batch_size: 128{more}}}
methods: [natural, trades]
columns: [clean, {{heading: PGD, attack: pgd(steps=2)}}]
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, epochs: int = 1, more: str = "") -> None:
    (folder / "mine.yaml").write_text(YAML.format(epochs=epochs, more=more))


@pytest.mark.slow
def test_it_prints_the_table_and_goes_on_to_nothing(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here)
    cli.main(["study", "mine.yaml", "--dry-run"])
    assert "trades on digits, seed 0: trained for 0 of 1 epochs, 0 of 2 columns measured" in capsys.readouterr().out
    assert {path.name for path in here.iterdir()} == {"mine.yaml"}
    cli.main(["study", "mine.yaml", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "Written: studies/mine-tiny" in printed
    assert "2 of 2 cells are finished." in (here / "studies/mine-tiny/report.html").read_text()
    cli.main(["study", "mine.yaml", "--device", "cpu"])
    assert "2 of 2 cells were finished before" in capsys.readouterr().out


def test_a_failed_cell_is_exit_code_1(here: Path, capsys: pytest.CaptureFixture[str]):
    write(here, more=", lr: 1e30")
    with pytest.raises(SystemExit) as end:
        cli.main(["study", "mine.yaml", "--device", "cpu"])
    assert end.value.code == 1
    assert "cells failed; the same command tries" in capsys.readouterr().err
    cli.main(["study", "mine.yaml", "--dry-run"])
    assert "failed: the loss became nan" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--executor", "rya"], ["--gpus", "1"], ["--time-budget", "foo"], ["--seeds", "0"], ["--scale", "tyni"]]
)
def test_a_dry_run_refuses_what_the_run_would(wrong: list[str], here: Path, capsys: pytest.CaptureFixture[str]):
    write(here)
    with pytest.raises(SystemExit) as end:
        cli.main(["study", "mine.yaml", "--dry-run", *wrong])
    assert end.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


@pytest.mark.slow
def test_sigterm_stops_in_good_order_and_the_same_command_goes_on(here: Path):
    write(here, epochs=400)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "advalign", "study", "mine.yaml", "--device", "cpu"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for _ in range(600):
        if list(here.glob("runs/natural-*/log.jsonl")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0, printed
    assert "Stopped: " in printed
    assert "The same command goes on." in printed
    assert "–" in (here / "studies/mine-tiny/table.md").read_text()
    (log,) = here.glob("runs/natural-*/log.jsonl")
    epochs = len(log.read_text().splitlines())
    assert 0 < epochs < 400
    again = subprocess.run(
        [*command, "--time-budget", "12s"], env=environment, capture_output=True, text=True, check=True
    )
    assert "Stopped: the time budget is used up" in again.stdout
    assert len(log.read_text().splitlines()) > epochs
