"""Evaluation as a verb: what is measured on which images, and what is written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from advalign.data import load as load_data
from advalign.errors import UserError
from advalign.measure import measure
from advalign.recipes import digits
from advalign.runs import Run, load, read_records
from advalign.training import train

QUICK = replace(digits(), epochs=2, steps=1, batch_size=128)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    return train("at", data="digits", model="small-cnn(width=4)", recipe=QUICK, runs=folder, device="cpu")


def test_records_say_what_was_measured(run: Run):
    result = measure(run.path, ["fgsm"], n=200, device="cpu")
    clean, attacked, worst = result.records
    assert (clean.attack, attacked.attack, worst.attack) == ("clean", "fgsm", "worst(fgsm)")
    assert {record.threat for record in result.records} == {"Linf(0.2)"}  # what it was trained against
    assert attacked.method == "at"
    assert attacked.checkpoint == "best"
    assert (attacked.n, attacked.training_images, attacked.epochs) == (200, 1147, 2)
    assert attacked.run == run.id
    assert attacked.torch == torch.__version__


def test_clean_accuracy_is_that_of_the_checkpoint_on_the_whole_test_set(run: Run):
    test = load_data("digits").test
    for checkpoint in ("best", "last"):
        with torch.no_grad():
            right = load(run.path, checkpoint)(test.floats()).argmax(1) == test.labels
        (clean,) = measure(run.path, ["none"], checkpoint=checkpoint, device="cpu").records
        assert clean.accuracy == pytest.approx(right.double().mean().item())
        assert clean.n == 500


def test_measuring_twice_gives_the_same_images_and_replaces_the_records(run: Run, tmp_path: Path):
    first = measure(run.path, ["pgd(steps=3)"], n=100, device="cpu", out=tmp_path / "a")
    count = len(read_records(run.path / "records.jsonl"))
    again = measure(run.path, ["pgd(steps=3)"], n=100, device="cpu", out=tmp_path / "b")
    assert len(read_records(run.path / "records.jsonl")) == count
    assert json.loads(first.path.read_text())["outcomes"] == json.loads(again.path.read_text())["outcomes"]


def test_the_subset_is_stratified(run: Run):
    result = measure(run.path, ["none"], n=100, device="cpu")
    assert len(result.evaluation) == 100


def test_standard_expands_to_the_usual_attacks(run: Run):
    from advalign.attacks import STANDARD, parse, spelled
    from advalign.threats import Linf

    result = measure(run.path, ["standard"], n=20, device="cpu")
    expected = [spelled(parse(name, threat=Linf())) for name in STANDARD]
    assert [record.attack for record in result.records] == ["clean", *expected, f"worst({', '.join(expected)})"]
    by_attack = {record.attack: record.accuracy for record in result.records}
    assert result.records[-1].accuracy <= min(by_attack[name] for name in expected)


def test_a_radius_is_never_taken_over_to_another_norm(run: Run):
    with pytest.raises(UserError, match="--norm l2 needs its radius"):
        measure(run.path, ["fgsm"], norm="l2", n=20, device="cpu")
    assert measure(run.path, ["fgsm"], norm="l2", eps=0.5, n=20, device="cpu").records[0].threat == "L2(0.5)"


def test_images_have_the_size_that_the_model_was_trained_on(tmp_path: Path):
    """A run on resized image files is evaluated at that size without being told, and at no other."""
    from PIL import Image

    for label in ("dark", "light"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for k in range(12):
            shade = 40 + 3 * k + 120 * (label == "light")
            Image.new("RGB", (20, 24), (shade, shade, shade)).save(tmp_path / "photos" / label / f"{k}.png")
    recipe = replace(QUICK, batch_size=8, validation=4, subset=None)
    trained = train(
        "at", data=f"folder:{tmp_path / 'photos'}", model="small-cnn(width=4)", recipe=recipe, image_size=16,
        runs=tmp_path / "runs", device="cpu",
    )  # fmt: skip
    assert trained.setting["shape"] == [3, 16, 16]
    assert measure(trained.path, ["none"], device="cpu").records[0].n == 4
    with pytest.raises(UserError, match=r"shape \(3, 8, 8\), but .* was trained on \(3, 16, 16\)"):
        measure(trained.path, ["none"], image_size=8, device="cpu")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"out": __file__}, "not a folder"),
    ],
)
def test_what_cannot_work_is_refused_before_the_attacks_run(run: Run, options: dict, words: str, monkeypatch):
    monkeypatch.setattr("advalign.measure.evaluate", lambda *_, **__: pytest.fail("the evaluation has begun"))
    with pytest.raises(UserError, match=words):
        measure(run.path, ["fgsm"], device="cpu", **options)


@pytest.mark.parametrize("attack", ["pdg", "pgd(stpes=3)", "worst(apgd-ce, sqare)", "worst(cw)"])
def test_a_misspelt_attack_is_refused_before_data_are_loaded(run: Run, attack: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("advalign.measure.load", lambda *_, **__: pytest.fail("data are being loaded"))
    with pytest.raises(UserError, match=r"did you mean|worst"):
        measure(run.path, ["fgsm", attack], device="cpu")


# The command line, but with its state on the disk after each batch and not at most every ten seconds.
HASTY = "import advalign.evaluation as e; e.SAVE_SECONDS = 0.0; from advalign.cli import main; main()"


def test_kill_9_and_the_same_command_gives_the_same_outcome_of_every_image(run: Run, tmp_path: Path):
    def start(out: Path) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-c",
            HASTY,
            "evaluate",
            str(run.path),
            "--attacks",
            "pgd(steps=10)",
            "worst(mim, fgsm)",
        ]
        return subprocess.Popen(
            [*command, "--batch-size", "16", "--save-examples", "--device", "cpu", "--out", str(out)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finished(out: Path) -> tuple[dict, dict]:
        (file,) = (file for file in out.glob("*.json") if "robustbench" not in file.name)
        (examples,) = out.glob("*.npz")
        return json.loads(file.read_text()), dict(np.load(examples))

    whole = start(tmp_path / "whole")
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output
    for states in (5, 2, 1):  # on a busy machine this process may sleep through the other's end: then earlier
        out = tmp_path / str(states)
        process, seen = start(out), set()
        while len(seen) < states and process.poll() is None:
            seen |= {file.stat().st_mtime_ns for file in out.glob(".*.state")} if out.exists() else set()
            time.sleep(0.001)
        process.kill()
        process.communicate(timeout=60)
        if not list(out.glob("*.json")):
            break
    again = start(out)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "goes on where it was interrupted" in output
    (content, examples), (expected, others) = finished(out), finished(tmp_path / "whole")
    for what in ("outcomes", "passes", "trails", "members"):
        assert content[what] == expected[what], what
    assert examples.keys() == others.keys()
    assert all(np.array_equal(examples[name], others[name]) for name in examples)
    assert not list(out.glob(".*"))


def test_an_unfinished_run_is_recorded_with_the_epochs_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    recipe = replace(QUICK, epochs=10_000)
    stopped = None
    while stopped is None or not (stopped.path / "best.safetensors").exists():
        stopped = train(
            "at", data="digits", model="small-cnn(width=4)", recipe=recipe, runs=tmp_path, device="cpu", time_budget=0.5
        )
    assert not stopped.finished
    (clean,) = measure(stopped.path, ["none"], n=50, device="cpu", console=Console()).records
    assert clean.epochs == len(stopped.log) < 10_000
    assert "is not finished" in capsys.readouterr().out.replace("\n", " ")
