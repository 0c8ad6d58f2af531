"""A training that starts from given weights: whose they are, what fits, and that the run is known by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from advalign.data import load
from advalign.errors import UserError
from advalign.models import build
from advalign.models.split_norm import SplitNorm
from advalign.objectives import parse
from advalign.report.commands import train_line
from advalign.runs import Run
from advalign.runs.checkpoint import load_weights
from advalign.training.plan import Plan
from advalign.training.planning import plan
from advalign.training.recipes import Recipe, digits
from advalign.training.train import train

MODEL = "small-cnn(width=4)"
QUICK = replace(digits(), epochs=1, steps=1, subset=128)
STILL = replace(QUICK, lr=1e-12, weight_decay=0.0)
"""A rate at which weights stay where they start."""


def quick(method: str, folder: Path, recipe: Recipe = QUICK, **options) -> Run:
    return train(method, data="digits", model=MODEL, recipe=recipe, runs=folder, device="cpu", **options)


def planned(method: str, folder: Path, **options) -> Plan:
    return plan(parse(method), load("digits"), MODEL, QUICK, runs=folder, guests={}, **options)


@pytest.fixture
def start(tmp_path: Path) -> dict[str, Tensor]:
    """A trained network's weights, in `start.pt`."""
    torch.manual_seed(5)
    net = build(MODEL, classes=10, channels=1)
    with torch.no_grad():
        for tensor in net.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.9)
    torch.save({"model": net.state_dict()}, tmp_path / "start.pt")
    return {name: value.clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("average", ["none", "ema"])
@pytest.mark.parametrize("method", ["natural", "trades"])
def test_the_student_starts_from_the_weights(method: str, average: str, start: dict[str, Tensor], tmp_path: Path):
    run = quick(method, tmp_path / "runs", replace(STILL, average=average), init=tmp_path / "start.pt")
    parameters = {name for name, _ in build(MODEL, classes=10, channels=1).named_parameters()}
    trained, card = load_weights(run.weights("last"))
    for name in parameters:
        torch.testing.assert_close(trained[name], start[name], atol=1e-6, rtol=0)
    assert card["init"] == run.setting["init"]


def test_both_norms_of_ar_at_start_from_the_one_in_the_file(start: dict[str, Tensor], tmp_path: Path):
    student = planned("at+ar-at", tmp_path, init=tmp_path / "start.pt").untrained_objective().student
    norms = {name: module for name, module in student.named_modules() if isinstance(module, SplitNorm)}
    assert norms
    for name, norm in norms.items():
        for key in ("weight", "bias", "running_mean", "running_var"):
            for view in (norm.clean, norm.adv):
                assert torch.equal(getattr(view, key), start[f"{name}.{key}"])


def test_the_run_is_known_by_what_it_starts_from(start: dict[str, Tensor], tmp_path: Path):
    first = tmp_path / "start.pt"
    torch.save(start, tmp_path / "same.pt")
    torch.save({name: value + 1 for name, value in start.items()}, tmp_path / "other.pt")
    without = planned("at", tmp_path)
    assert "init" not in without.run.setting
    ids = {planned("at", tmp_path, init=tmp_path / f"{name}.pt").run.id for name in ("start", "same", "other")}
    assert len({without.run.id, *ids}) == 4  # a file is known by its bytes
    assert planned("at", tmp_path, init=first).kind != without.kind
    guest = planned("at+vfd", tmp_path, init=first).guests["vanilla"]
    assert isinstance(guest, Plan)
    assert guest.run.id == planned("natural", tmp_path).run.id  # guests are trained from the beginning, and shared


@pytest.mark.slow
def test_a_run_starts_from_a_run_and_its_line_says_so(tmp_path: Path):
    natural = quick("natural", tmp_path, replace(digits(), epochs=3, steps=1, subset=512))
    run = quick("at+vfd", tmp_path, init=natural.path, guests={"vanilla": natural.path})
    assert run.setting["init"] == run.setting["guests"]["vanilla"] == natural.id
    line = train_line(run, {natural.id: natural.path})
    assert f"--vanilla {natural.path} --init {natural.path}" in line
    assert "--init INIT" in train_line(run, {})
    assert f"INIT: the run or weights file with digest {natural.id}" in train_line(run, {})
    again = quick("at+vfd", tmp_path, init=natural.weights("best"), guests={"vanilla": natural.path})
    assert again.id == run.id


@pytest.mark.parametrize(
    ("method", "model", "classes", "words"),
    [
        ("at", MODEL, 7, r"'fc.weight' is \(7, 16\), not \(10, 16\): it is a network for 7 classes, not 10"),
        ("at", "small-cnn(width=6)", 10, "a network of another width"),
        ("afa", MODEL, 10, "afa starts from its extractor model: give that, --guest extractor=SOURCE, not --init"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_any_work(
    method: str, model: str, classes: int, words: str, tmp_path: Path
):
    torch.save(build(model, classes=classes, channels=1).state_dict(), tmp_path / "a.pt")
    with pytest.raises(UserError, match=words):
        quick(method, tmp_path / "runs", init=tmp_path / "a.pt")
    assert not (tmp_path / "runs").exists()


def test_a_run_of_another_architecture_is_refused_by_name(tmp_path: Path):
    other = train("natural", data="digits", model="small-cnn(width=6)", recipe=QUICK, runs=tmp_path, device="cpu")
    with pytest.raises(UserError, match=r"is of a small-cnn\(width=6\), and the student is a small-cnn\(width=4\)"):
        quick("at", tmp_path / "runs", init=other.path)
