"""How sure an accuracy is, and an evaluation that goes on until it is sure enough."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy.stats import binomtest

from advalign import models
from advalign.data import load, stratified_subset
from advalign.errors import UserError
from advalign.evaluation import until as module
from advalign.evaluation.checks import check_clean, warnings_of
from advalign.evaluation.evaluator import Evaluator
from advalign.evaluation.interval import half_width, images_needed, wilson
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.state import EvaluationState
from advalign.evaluation.target import SUBSET_SEED
from advalign.evaluation.until import joined, next_draw
from advalign.report.commands import evaluate_line
from advalign.report.evaluation import evaluation_table
from advalign.runs import Run
from advalign.training.recipes import digits
from advalign.training.train import train

ON_CPU = TargetOptions(device="cpu")
ATTACKS = ["fgsm", "worst(fgsm, apgd-ce(steps=2))", "pgd(steps=1, target=3)"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = replace(digits(), epochs=1, steps=1, batch_size=128)
    folder = tmp_path_factory.mktemp("runs")
    return train("at", data="digits", model="small-cnn(width=4)", recipe=recipe, runs=folder, device="cpu")


@pytest.mark.parametrize(("right", "n"), [(0, 7), (7, 7), (1, 500), (250, 500), (499, 500), (1, 1)])
def test_the_interval_is_wilsons(right: int, n: int):
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
    expected = binomtest(right, n).proportion_ci(0.999, method="wilson")
    assert wilson(right, n, 3.2905267314919255) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize("width", [0.2, 0.05, 0.0098])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.5, 0.9, 1.0])
def test_the_least_number_of_images_that_will_do(share: float, width: float):
    n = images_needed(share, width)
    assert half_width(share, n) <= width
    assert n == 1 or half_width(share, n - 1) > width


def test_a_draw_contains_the_one_before_though_shares_are_rounded():
    labels = torch.tensor([0] * 6 + [1] * 6 + [2] * 2)  # the Alabama paradox: the third class has 2 of 10, 1 of 11
    drawn = torch.tensor([], dtype=torch.long)
    for size in range(1, 15):
        more, larger = next_draw(labels, drawn, max(size, len(drawn)))
        assert sorted([*more.tolist(), *drawn.tolist()]) == larger.tolist()
        drawn = larger
    assert len(drawn) == 14


def test_what_any_draw_casts_doubt_on_is_said_once_and_clean_accuracy_is_judged_on_all_images():
    labels, lucky, parts = torch.arange(60) % 3, 3 * [False] + 57 * [True], []
    for first, last, doubts in ((0, 3, ["random", "flat"]), (3, 30, ["dark", "random"]), (30, 60, [])):
        right = torch.tensor(lucky[first:last])
        said = [*doubts, *warnings_of([check_clean(right, labels[first:last])])]
        parts.append(EvaluationState({"clean": right}, {"clean": 1.0}, {"clean": [len(right), 0]}, doubts=said))
    assert len(parts[0].doubts) == 3
    assert joined(parts, torch.arange(60), labels).doubts == ["random", "flat", "dark"]
    for part in parts:
        part.correct["clean"][:] = False
    assert "Clean accuracy is 0.0 ± 0.0 %" in joined(parts, torch.arange(60), labels).doubts[-1]


def test_it_ends_when_all_accuracies_are_sure_enough_on_the_images_that_n_draws(run: Run, tmp_path: Path):
    measured = measure(run.path, ATTACKS, ON_CPU, until=8.0, out=tmp_path, save_examples=True)
    evaluation, n = measured.evaluation, measured.records[0].n
    intervals = [binomtest(int(x.sum()), n).proportion_ci(method="wilson") for x in evaluation.outcomes.values()]
    assert max(interval.high - interval.low for interval in intervals) <= 0.16
    assert n < 500
    drawn = measure(run.path, ["none"], replace(ON_CPU, n=n), out=tmp_path)
    assert drawn.evaluation.correct["clean"].equal(evaluation.correct["clean"])
    assert (drawn.by_class.sizes, drawn.by_class.correct["clean"]) == (
        measured.by_class.sizes, measured.by_class.correct["clean"]
    )  # fmt: skip
    # Every part of the result belongs to the image that it stands with: what is broken was changed, the others not.
    data = stratified_subset(load("digits").test, n, SUBSET_SEED)
    for name, x_adv in evaluation.examples.items():
        touched = (x_adv != data.floats()).flatten(1).any(1)
        assert not (touched & ~evaluation.correct["clean"]).any()
        assert (x_adv - data.floats()).abs().amax() <= 0.2 + 1e-6, name
    assert sum(evaluation.passes["clean"]) == n
    trail = evaluation.trails[ATTACKS[1]]
    assert list(trail.values())[-1] == pytest.approx(evaluation.accuracies()[ATTACKS[1]])
    members = evaluation.members[ATTACKS[1]].values()
    assert sum(map(sum, members)) == sum(evaluation.passes[ATTACKS[1]])
    content = json.loads(measured.path.read_text())
    assert content["until"] == 8.0
    words = evaluate_line(run, content, {}).split()
    assert words[words.index("--until") + 1] == "8"
    assert "--n" not in words
    assert f"over the choice of {n} test images" in evaluation_table(measured).caption


def test_a_stop_between_and_within_the_draws_changes_no_image(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("advalign.evaluation.state.SAVE_SECONDS", -1.0)
    whole = measure(run.path, ATTACKS, ON_CPU, until=8.0, out=tmp_path / "whole").evaluation
    attack, calls = Evaluator._attack_batch, 0

    def stops(self: Evaluator, *given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 0:
            raise KeyboardInterrupt
        return attack(self, *given)

    monkeypatch.setattr(Evaluator, "_attack_batch", stops)
    console = Console(width=400)
    for _ in range(20):
        try:
            resumed = measure(
                run.path, ATTACKS, ON_CPU, until=8.0, out=tmp_path / "stopped", console=console
            ).evaluation
            break
        except KeyboardInterrupt:
            assert list((tmp_path / "stopped").glob(".*.state"))
    else:
        raise AssertionError("it never ended")
    assert all(resumed.correct[name].equal(flags) for name, flags in whole.correct.items())
    assert resumed.success == whole.success
    assert not list((tmp_path / "stopped").glob(".*.state"))
    printed = capsys.readouterr().out
    assert 0 < printed.count("resuming an interrupted evaluation: ") == printed.count("-0.state") < calls


def test_all_images_may_not_be_enough(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measured = measure(run.path, ["none"], ON_CPU, until=0.5, out=tmp_path, console=Console(width=200))
    assert measured.records[0].n == 500
    needed = images_needed(measured.records[0].accuracy, 0.005)
    assert f"; 0.5 would take {needed} images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "given", "words"),
    [
        (ON_CPU, {"until": 0.0}, "until=0 must be above 0 and below 50"),
        (ON_CPU, {"until": 60.0}, "until=60 must be"),
        (replace(ON_CPU, n=100), {"until": 1.0}, "give n=100 or until=1"),
        (ON_CPU, {"until": 1.0, "surrogate": "runs/x"}, "leave out surrogate"),
    ],
)
def test_what_does_not_go_together_is_refused_first(
    run: Run, options: TargetOptions, given: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "evaluate_until", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(UserError, match=words):
        measure(run.path, ["none"], options, **given)


def test_what_cannot_work_is_refused_before_the_first_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(models.build("small-cnn(width=2)", classes=10, channels=1).state_dict(), tmp_path / "net.pt")
    x = np.random.default_rng(0).random((30, 1, 8, 8), dtype=np.float32)  # between the levels of 8 bits
    np.savez(tmp_path / "own.npz", x_test=x, y_test=np.arange(30) % 10)
    options = TargetOptions(data=f"npz:{tmp_path / 'own.npz'}", norm="linf", eps=0.1, device="cpu")
    monkeypatch.setattr(Evaluator, "classify_clean", lambda *_, **__: pytest.fail("work was done"))
    given = partial(measure, f"small-cnn(width=2)@{tmp_path / 'net.pt'}", ["fgsm"], options, until=20.0, out=tmp_path)
    with pytest.raises(UserError, match="quantized to 8 bits: 30 of 30 clean images"):
        given(quantize=8)
    monkeypatch.setattr("advalign.runtime.memory.free_memory", lambda device: 100)
    with pytest.raises(UserError, match="keeping adversarial images of"):
        given(save_examples=True)
