"""Evaluation as a verb: what is measured on which images, and what is written down."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advalign.data import load as load_data
from advalign.data import stratified_subset
from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.results import Measurement
from advalign.models import build
from advalign.runs import Run, load, read_records
from advalign.training.recipes import digits
from advalign.training.train import train

QUICK = replace(digits(), epochs=2, steps=1, batch_size=128)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    return train("at", data="digits", model="small-cnn(width=4)", recipe=QUICK, runs=folder, device="cpu")


def measure_with(source: Path, **given: Any) -> Measurement:
    """Measure with options of all kinds."""
    target, attack = (
        {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}
        for kind in (TargetOptions, AttackOptions)
    )
    options = {"target_options": TargetOptions(**target), "attack_options": AttackOptions(**attack)}
    return measure(source, **options, **given)


def test_records_say_what_was_measured(run: Run):
    result = measure(run.path, ["fgsm"], TargetOptions(n=200, device="cpu"))
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
        (clean,) = measure(run.path, ["none"], TargetOptions(checkpoint=checkpoint, device="cpu")).records
        assert clean.accuracy == pytest.approx(right.double().mean().item())
        assert clean.n == 500


def test_measuring_twice_gives_the_same_images_and_replaces_the_records(run: Run, tmp_path: Path):
    first = measure(run.path, ["pgd(steps=3)"], TargetOptions(n=100, device="cpu"), out=tmp_path / "a")
    count = len(read_records(run.path / "records.jsonl"))
    again = measure(run.path, ["pgd(steps=3)"], TargetOptions(n=100, device="cpu"), out=tmp_path / "b")
    assert len(read_records(run.path / "records.jsonl")) == count
    assert json.loads(first.path.read_text())["outcomes"] == json.loads(again.path.read_text())["outcomes"]


def test_the_subset_is_stratified(run: Run):
    result = measure(run.path, ["none"], TargetOptions(n=100, device="cpu"))
    assert len(result.evaluation) == 100


def test_standard_expands_to_the_usual_attacks(run: Run):
    from advalign.attacks import STANDARD, parse
    from advalign.threats import Linf

    result = measure(run.path, ["standard"], TargetOptions(n=20, device="cpu"))
    expected = [str(parse(name, threat=Linf())) for name in STANDARD]
    assert [record.attack for record in result.records] == ["clean", *expected, f"worst({', '.join(expected)})"]
    by_attack = {record.attack: record.accuracy for record in result.records}
    assert result.records[-1].accuracy <= min(by_attack[name] for name in expected)


def test_a_radius_is_never_taken_over_to_another_norm(run: Run):
    with pytest.raises(UserError, match="--norm l2 needs its radius"):
        measure(run.path, ["fgsm"], TargetOptions(norm="l2", n=20, device="cpu"))
    assert (
        measure(run.path, ["fgsm"], TargetOptions(norm="l2", eps=0.5, n=20, device="cpu")).records[0].threat
        == "L2(0.5)"
    )


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
    held_out = load_data(f"folder:{tmp_path / 'photos'}", image_size=16).test
    assert measure(trained.path, ["none"], TargetOptions(device="cpu")).records[0].n == len(held_out) > 0
    with pytest.raises(UserError, match=r"shape \(3, 8, 8\), but .* was trained on \(3, 16, 16\)"):
        measure(trained.path, ["none"], TargetOptions(image_size=8, device="cpu"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp8"}, "unknown precision 'fp8'"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"out": __file__}, "not a folder"),
        ({"out": "/proc/results"}, "cannot write to /proc/results"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"mean": (0.3,)}, "--std is missing: give --mean and --std, or neither"),
        ({"mean": (0.3,), "std": (1.0,)}, "mean and std are for weights without a training record"),
        ({"attack_names": ["pgd(steps=3"]}, "cannot read 'pgd.steps=3': a bracket is not closed"),
        ({"attack_names": ["wrost(fgsm)"]}, "unknown attack 'wrost': did you mean 'worst'"),
        ({"attack_names": ["worst"]}, "worst needs attacks, as in 'worst"),
    ],
)
def test_what_cannot_work_is_refused_before_data_are_loaded(run: Run, options: dict, words: str, monkeypatch):
    monkeypatch.setattr("advalign.evaluation.target.load", lambda *_, **__: pytest.fail("data are being loaded"))
    with pytest.raises(UserError, match=words):
        measure_with(run.path, **{"attack_names": ["fgsm"], "device": "cpu", **options})


@pytest.mark.parametrize("attack", ["pdg", "pgd(stpes=3)", "worst(apgd-ce, sqare)", "worst(cw)"])
def test_a_misspelt_attack_is_refused_before_data_are_loaded(run: Run, attack: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("advalign.evaluation.target.load", lambda *_, **__: pytest.fail("data are being loaded"))
    with pytest.raises(UserError, match=r"did you mean|worst"):
        measure(run.path, ["fgsm", attack], TargetOptions(device="cpu"))


def test_an_attack_that_is_named_twice_is_run_once(run: Run):
    result = measure(run.path, ["fgsm", "pgd(steps=20)", "pgd", "fgsm"], TargetOptions(n=20, device="cpu"))
    assert [record.attack for record in result.records[:3]] == ["clean", "fgsm", "pgd(steps=20)"]


def test_results_are_named_by_weights_normalisation_and_surrogate(tmp_path: Path):
    """None overwrites another, and each says what it is of; the same again is the same file."""
    torch.manual_seed(0)
    weights, others = tmp_path / "net.pt", [tmp_path / f"{k}.pt" for k in "ab"]
    nets = [build("small-cnn(width=4)", classes=10, channels=1) for _ in range(4)]
    for file, net in zip([weights, *others], nets, strict=False):
        torch.save(net.state_dict(), file)

    def named(**options: Any) -> Path:
        how = {"model": "small-cnn(width=4)", "data": "digits", "eps": 0.1, "n": 20, "device": "cpu", **options}
        return measure_with(weights, attack_names=["fgsm"], **how).path

    surrogates = [f"small-cnn(width=4)@{file}" for file in others]
    variants = [{}, {"mean": (0.1,), "std": (1.0,)}, {"mean": (0.2,), "std": (1.0,)}]
    files = [named(**each) for each in [*variants, *({"surrogate": each} for each in surrogates)]]
    assert named() == files[0]
    torch.save(nets[-1].state_dict(), weights)
    files.append(named())
    assert len({*files}) == 6
    contents = [json.loads(file.read_text()) for file in files]
    assert contents[0]["weights"] != contents[-1]["weights"] == hashlib.sha256(weights.read_bytes()).hexdigest()[:16]
    assert [content["mean"] for content in contents[:3]] == [[], [0.1], [0.2]]
    assert contents[3]["surrogate_weights"] == hashlib.sha256(others[0].read_bytes()).hexdigest()[:16]
    assert contents[0]["records"][0]["method"] == "net.pt"
    assert contents[0]["records"][0]["run"] == ""  # what tells that training images, epochs and seed are not known


def test_the_distance_of_what_no_threat_confines(run: Run):
    result = measure(run.path, ["cw(steps=30, c=10)", "fgsm"], TargetOptions(n=40, device="cpu"), save_examples=True)
    (name, far), *others = result.distances.items()
    assert (name, others) == ("cw(c=10, steps=30)", [])
    arrays = np.load(result.path.with_suffix(".npz"))
    fooled = result.evaluation.correct["clean"].numpy() & ~arrays[f"correct {name}"]
    moved = np.sqrt(((arrays[f"x_adv {name}"] - arrays["x"]) ** 2).sum((1, 2, 3)))
    assert fooled.any()
    assert far == pytest.approx(moved[fooled].mean(), rel=1e-5)
    assert json.loads(result.path.read_text())["distances"] == result.distances
    assert (
        not measure(run.path, ["cw(steps=30, c=10)"], TargetOptions(n=40, device="cpu"))
        .path.with_suffix(".npz")
        .exists()
    )


def test_a_log_file_shows_life(run: Run, capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    measure(run.path, ["fgsm"], TargetOptions(n=20, device="cpu"), AttackOptions(batch_size=8), console=Console())
    assert capsys.readouterr().out.splitlines() == ["clean: 20 of 20 images", "fgsm: 20 of 20 images"]


# The command line, but with its state on the disk after each batch and not at most every ten seconds.
HASTY = "import advalign.evaluation.state as e; e.SAVE_SECONDS = -1.0; from advalign.cli.commands import main; main()"


def start(run: Run, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", HASTY, "evaluate", str(run.path), *arguments]
    return subprocess.Popen(
        [*command, "--batch-size", "16", "--save-examples", "--device", "cpu", "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finished(out: Path) -> tuple[dict, dict]:
    (file,) = (file for file in out.glob("*.json") if "robustbench" not in file.name)
    (examples,) = out.glob("*.npz")
    return json.loads(file.read_text()), dict(np.load(examples))


def kill_after(process: subprocess.Popen[str], folder: Path, states: int) -> None:
    """Kill -9 once a folder has seen so many states; on a busy machine this process may sleep through them."""
    seen = set()
    while len(seen) < states and process.poll() is None:
        for file in folder.glob(".*.state"):
            with contextlib.suppress(FileNotFoundError):
                seen.add(file.stat().st_mtime_ns)
        time.sleep(0.001)
    process.kill()
    process.communicate(timeout=60)


def same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> None:
    for what in ("outcomes", "passes", "trails", "members"):
        assert found[0][what] == expected[0][what], what
    assert found[1].keys() == expected[1].keys()
    assert all(np.array_equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.slow
def test_kill_9_and_the_same_command_gives_the_same_outcome_of_every_image(run: Run, tmp_path: Path):
    attacks = ["--attacks", "pgd(steps=10)", "worst(mim, fgsm)"]
    whole = start(run, tmp_path / "whole", *attacks)
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output
    for states in (5, 2, 1):  # if it was through before it was killed, then earlier
        out = tmp_path / str(states)
        kill_after(start(run, out, *attacks), out, states)
        if not list(out.glob("*.json")):
            break
    again = start(run, out, *attacks)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "resuming an interrupted" in output
    same(finished(out), finished(tmp_path / "whole"))
    assert not list(out.glob(".*"))


@pytest.mark.slow
@pytest.mark.weekly
def test_kill_9_while_the_surrogates_examples_are_made(run: Run, tmp_path: Path):
    """The second process makes only what is left; its examples are those of one that was never stopped."""
    attack = ["--attacks", "pgd(steps=40)", "--surrogate"]
    torch.manual_seed(0)
    net, surrogates = build("small-cnn(width=4)", classes=10, channels=1), []
    for folder in ("whole", "5", "2", "1"):
        (tmp_path / folder).mkdir()
        torch.save(net.state_dict(), tmp_path / folder / "net.pt")
        surrogates.append(f"small-cnn(width=4)@{tmp_path / folder / 'net.pt'}")
    whole = start(run, tmp_path / "whole", *attack, surrogates[0])
    output, _ = whole.communicate(timeout=120)
    assert whole.returncode == 0, output
    out, surrogate = tmp_path, ""
    for states, surrogate in zip((5, 2, 1), surrogates[1:], strict=True):
        out = tmp_path / str(states)
        kill_after(start(run, out, *attack, surrogate), out / "transfer", states)
        if list((out / "transfer").glob(".*.state")):
            break
    assert not list((out / "transfer").glob("*.safetensors"))
    again = start(run, out, *attack, surrogate)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert "resuming an interrupted" in output
    same(finished(out), finished(tmp_path / "whole"))
    ours, theirs = ((tmp_path / folder / "transfer").glob("*.safetensors") for folder in (out.name, "whole"))
    assert next(ours).read_bytes() == next(theirs).read_bytes()
    assert not list((out / "transfer").glob(".*"))


def test_an_unfinished_run_is_recorded_with_the_epochs_it_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from rich.console import Console

    recipe = replace(QUICK, epochs=10_000)
    stopped = None
    while stopped is None or not (stopped.path / "best.safetensors").exists():
        stopped = train(
            "at", data="digits", model="small-cnn(width=4)", recipe=recipe, runs=tmp_path, device="cpu", time_budget=0.5
        )
    assert not stopped.finished
    (clean,) = measure(stopped.path, ["none"], TargetOptions(n=50, device="cpu"), console=Console()).records
    assert clean.epochs == len(stopped.log) < 10_000
    assert "is not finished" in capsys.readouterr().out.replace("\n", " ")


def test_records_that_cannot_be_added_to_are_refused_before_the_attacks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    shutil.copytree(run.path, folder)
    monkeypatch.setattr("advalign.evaluation.measure.evaluate", None)  # would be called
    (folder / "records.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"records\.jsonl, line 1 is damaged"):
        measure(folder, ["none"], out=tmp_path / "out")
    (folder / "records.jsonl").unlink()
    (folder / "records.jsonl").mkdir()
    with pytest.raises(UserError, match=r"records\.jsonl"):
        measure(folder, ["none"], out=tmp_path / "out")
    (folder / "records.jsonl").rmdir()
    (folder / ".records.jsonl.lock").unlink(missing_ok=True)
    (folder / ".records.jsonl.lock").mkdir()
    with pytest.raises(UserError, match=r"cannot lock .*\.records\.jsonl\.lock: remove it"):
        measure(folder, ["none"], out=tmp_path / "out")
    (folder / ".records.jsonl.lock").rmdir()

    def read_only(path: Path) -> None:
        if path == folder:
            raise UserError(f"cannot write to {path}: Read-only file system")

    monkeypatch.setattr("advalign.runs.records.require_writable", read_only)
    with pytest.raises(UserError, match="Read-only"):
        measure(folder, ["none"], out=tmp_path / "out")


def test_states_of_other_versions_go_with_the_finished_evaluation(run: Run, tmp_path: Path):
    measured = measure(run.path, ["none"], out=tmp_path)
    stale, other = (tmp_path / f".{stem}-01234567.state" for stem in (measured.path.stem, "best-76543210"))
    for file in (stale, other):
        file.touch()
    measure(run.path, ["none"], out=tmp_path)
    assert not stale.exists()
    assert other.exists()


def test_one_of_two_state_dicts_in_a_file_is_measured_and_named(tmp_path: Path):
    nets = {name: build("small-cnn(width=2)", classes=10, channels=1).eval() for name in ("model", "ema")}
    torch.save({name: net.state_dict() for name, net in nets.items()}, tmp_path / "a.pt")
    source, options = f"small-cnn(width=2)@{tmp_path / 'a.pt'}", TargetOptions(data="digits", n=200, device="cpu")
    with pytest.raises(UserError, match="holds 2 state dicts"):
        measure(source, ["none"], options)
    images = measure(f"{source}#model", ["none"], options)
    averaged = measure(f"{source}#ema", ["none"], options)
    assert images.path != averaged.path
    assert averaged.records[0].method == "a.pt#ema"
    assert json.loads(averaged.path.read_text())["part"] == "ema"
    test = stratified_subset(load_data("digits").test, 200, 0)
    for name, measured in (("model", images), ("ema", averaged)):
        with torch.no_grad():
            right = nets[name](test.floats()).argmax(1) == test.labels
        assert torch.equal(measured.evaluation.correct["clean"], right)
