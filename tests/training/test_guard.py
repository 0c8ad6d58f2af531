"""The guard against catastrophic overfitting: what it calls a collapse, and that the training goes back for it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests.training.same_runs import assert_same, assert_same_run

from advalign.attacks.classification import classified
from advalign.data import Images, load
from advalign.errors import TrainingError, UserError
from advalign.models import build
from advalign.runs import Run
from advalign.runs import load as load_run
from advalign.runs.checkpoint import load_state
from advalign.threats import Linf
from advalign.training import guard
from advalign.training.attacks import training_attack
from advalign.training.guard import CHECKS, Guard, Seen, Watch
from advalign.training.recipes import Recipe, digits
from advalign.training.step import Step
from advalign.training.train import train

RECIPE = replace(digits(), epochs=3, subset=192, batch_size=32, validation=60, attack="n-fgsm")
STEPS = 6


def trained(folder: Path, recipe: Recipe = RECIPE, method: str = "at", **options: Any) -> Run:
    model = "small-cnn(width=2)"
    return train(method, data="digits", model=model, recipe=recipe, runs=folder, device="cpu", **options)


@pytest.fixture
def collapsing(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let the guard measure these accuracies, one after the other, and then always the last."""
    script: list[float] = []

    def measure(self: Guard, student: torch.nn.Module, threat: object) -> Seen:
        robust = script.pop(0) if len(script) > 1 else script[0]
        return Seen(robust, one_step=robust)

    monkeypatch.setattr(Guard, "measure", measure)
    return script


def guarding(images: int = 400, classes: int = 10, recipe: Recipe = RECIPE) -> Guard:
    labels = torch.arange(images) % classes
    return Guard(recipe, guard.REMEDIES, 9, Images(torch.zeros(images, 1, 8, 8), labels))


@pytest.mark.parametrize(
    ("accuracies", "collapses"),
    [
        ([0.1, 0.3, 0.4, 0.35, 0.3], [False] * 5),
        ([0.1, 0.4, 0.02], [False, False, True]),
        ([0.4, 0.26], [False, False]),  # by less than half of what lies above chance
        ([0.4, 0.24], [False, True]),
        ([0.11, 0.0], [False, False]),  # chance
        ([0.4, 0.3, 0.2], [False, False, True]),  # against the highest, not the last
    ],
    ids=str,
)
def test_a_collapse_is_a_fall_by_half(accuracies: list[float], collapses: list[bool]):
    watch, guarded = Watch(), guarding()
    assert [guarded.collapsed(watch, Seen(robust, robust)) for robust in accuracies] == collapses


def test_one_answer_for_all_withstands_its_class_and_is_no_robustness():
    watch, guarded = Watch(), guarding(classes=2)
    assert [guarded.collapsed(watch, Seen(robust, robust)) for robust in (0.5, 0.2, 0.08, 0.7, 0.5)] == [False] * 4 + [
        True
    ]


def test_a_few_images_are_no_evidence():
    watch, guarded = Watch(), guarding(images=20)
    assert not any(guarded.collapsed(watch, Seen(robust, robust)) for robust in (0.4, 0.1))


def test_what_withstands_single_steps_alone_is_a_collapse_without_any_history():
    watch, guarded = Watch(), guarding()
    assert not guarded.collapsed(watch, Seen(robust=0.05, one_step=0.4))
    assert guarded.collapsed(watch, Seen(robust=0.05, one_step=0.5))


def test_it_measures_both_attacks_in_the_threat_of_the_moment():
    data = load("digits").test
    net = build("small-cnn(width=2)", classes=10, channels=1).eval()
    guarded = Guard(RECIPE, guard.REMEDIES, 9, data)
    assert len(guarded.images) == guard.IMAGES
    none, all_ = (guarded.measure(net, Linf(eps)) for eps in (0.0, 0.2))
    clean = classified(net(guarded.images.floats()), guarded.images.labels).double().mean().item()
    assert none == Seen(clean, clean)
    assert all_.robust <= all_.one_step <= clean


@pytest.mark.parametrize(
    ("changes", "remedies"),
    [
        ({"attack": "free"}, (5, 10)),
        ({"attack": "atta(steps=7)"}, (10,)),
        ({"attack": "pgd", "steps": "2:5"}, (5, 10)),
        ({"attack": "pgd", "steps": 10}, ()),
    ],
    ids=str,
)
def test_a_remedy_is_stronger_than_the_attack(changes: dict[str, Any], remedies: tuple[int, ...]):
    assert guard.remedies_for(training_attack(replace(RECIPE, **changes))) == remedies


def test_without_a_stronger_attack_there_is_no_guard(tmp_path: Path):
    with pytest.raises(UserError, match="nothing stronger to take"):
        trained(tmp_path, replace(RECIPE, attack="pgd", steps=10, guard=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_schedule_and_its_start_stay_and_no_part_has_less_than_the_remedy(collapsing: list[float], tmp_path: Path):
    collapsing[:] = [0.4, 0.0, 0.4]
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "take", lambda self, attack: taken.append((attack.all_steps, attack.start)))
        trained(tmp_path, replace(RECIPE, epochs=3, attack="pgd", steps="1:2:8", start="gaussian", guard=True))
    assert taken == [((5, 5, 8), "gaussian")]


def test_a_collapse_before_any_good_state_takes_the_remedy_from_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    script = [Seen(0.0, 0.9), Seen(0.3, 0.3)]
    monkeypatch.setattr(Guard, "measure", lambda self, student, threat: script.pop(0) if len(script) > 1 else script[0])
    run = trained(tmp_path)
    (collapse,) = [each for row in run.log for each in row.get("collapses", [])]
    assert collapse["back_to"] == collapse["epoch"]


def test_a_diverging_training_says_so_as_without_a_guard(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"Try a lower --lr"):
        trained(tmp_path, replace(RECIPE, lr=1000.0, schedule="constant"))


def test_an_epoch_is_reported_once_though_the_training_goes_back_to_its_end(collapsing: list[float], tmp_path: Path):
    collapsing[:] = [0.4, 0.4, 0.4, 0.0, 0.4]
    rows: list[int] = []
    trained(tmp_path, sinks=lambda run: [lambda row: rows.append(row["epoch"])])
    assert rows == [1, 2, 3]


def test_it_looks_several_times_an_epoch_and_the_log_tells_what_it_saw(collapsing: list[float], tmp_path: Path):
    collapsing[:] = [0.1, 0.2, 0.3, 0.3, 0.3, 0.3, 0.3, 0.3, 0.4]
    run = trained(tmp_path)
    assert [row["guard"] for row in run.log] == [[0.1, 0.2, 0.3], [0.3, 0.3, 0.3], [0.3, 0.3, 0.4]]
    assert len(run.log[0]["guard"]) == CHECKS
    assert "collapses" not in run.log[0]
    assert not run.good_state.exists()


@pytest.mark.slow
def test_a_guard_that_finds_nothing_changes_nothing(tmp_path: Path):
    watched, alone = trained(tmp_path / "a"), trained(tmp_path / "b", replace(RECIPE, guard=False))
    states = [load_state(run.state) for run in (watched, alone)]
    for state in states:
        state["log"] = [{key: row[key] for key in row.keys() - {"guard"}} for row in state["log"]]
    assert_same({key: states[0][key] for key in states[1]}, states[1])
    assert all("guard" in row for row in watched.log)
    assert not any("guard" in row for row in alone.log)


def test_a_collapse_goes_back_and_attacks_in_more_steps_from_there(collapsing: list[float], tmp_path: Path):
    """The end is that of a run whose attack was PGD with 5 steps since the last good check."""
    collapsing[:] = [0.2, 0.4, 0.4, 0.4, 0.01, 0.4]  # good at the second epoch's first third, lost at its second
    output = io.StringIO()
    run = trained(tmp_path / "a", console=Console(file=output, width=300))
    assert (
        "catastrophic overfitting in epoch 2: the accuracy under PGD-10 on validation images is 1%, and 40% was the "
        "highest. Back to epoch 1.33; PGD with at least 5 steps from there"
    ) in output.getvalue()
    (collapse,) = [each for row in run.log for each in row.get("collapses", [])]
    assert collapse["steps"] == 5
    assert collapse["epoch"] == pytest.approx(1 + 4 / STEPS)
    assert collapse["back_to"] == pytest.approx(1 + 2 / STEPS)
    assert "collapses" in run.log[1]

    collapsing[:] = [0.2, 0.4, 0.4, 0.4, 0.4]
    stopped = trained(tmp_path / "b", time_budget=0.0001)  # a run that stops at each step
    while load_state(stopped.state)["epoch"] * STEPS + load_state(stopped.state)["step"] < STEPS + 2:
        stopped = trained(tmp_path / "b", time_budget=0.0001)
    stronger = training_attack(replace(RECIPE, attack="pgd", steps=5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advalign.training.step.training_attack", lambda recipe: stronger)
        finished = trained(tmp_path / "b")
    assert_same(*(load_state(each.state)["objective"] for each in (run, finished)))
    assert_same(*(load_state(each.state)["optimizer"] for each in (run, finished)))


@pytest.mark.slow
def test_a_second_collapse_takes_ten_steps_and_then_it_watches_no_more(collapsing: list[float], tmp_path: Path):
    collapsing[:] = [0.4, 0.0, 0.4, 0.0, 0.4, 0.0, 0.0]
    run = trained(tmp_path)
    steps = [each["steps"] for row in run.log for each in row.get("collapses", [])]
    assert steps == [5, 10]
    assert run.finished
    load_run(run.path)


@pytest.mark.slow
def test_a_training_that_went_back_and_is_stopped_goes_on_to_the_same(collapsing: list[float], tmp_path: Path):
    script = [0.2, 0.4, 0.4, 0.4, 0.01, 0.4]
    collapsing[:] = list(script)
    whole = trained(tmp_path / "a")
    collapsing[:] = list(script)
    calls = 1
    while not (run := trained(tmp_path / "b", time_budget=0.0001)).finished:
        calls += 1
        assert calls < 60
    assert calls > 3
    assert_same_run(whole.path, run.path)


@pytest.mark.parametrize(
    ("method", "changes", "watched"),
    [
        ("at", {"attack": "free(m=2)"}, True),
        ("at", {"attack": "atta(steps=10)"}, False),
        ("at", {"attack": "pgd", "steps": 2}, False),
        ("at", {"attack": "pgd", "steps": 2, "guard": True}, True),
        ("natural", {"guard": True}, False),
    ],
)
def test_it_watches_cheap_attacks_and_others_if_asked(
    method: str, changes: dict[str, Any], watched: bool, tmp_path: Path
):
    run = trained(tmp_path, replace(RECIPE, epochs=1, **changes), method)
    assert ("guard" in run.log[0]) == watched
