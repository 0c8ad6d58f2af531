"""Training in fp16: the gradients of fp32, steps that are left out where they overflow, and a factor that is kept."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.objectives.short_training import bound
from tests.samples import batch
from tests.training.same_runs import assert_same_run
from torch import Tensor

from advalign.training.loss_scale import LossScale
from advalign.training.recipes import Recipe, digits
from advalign.training.step import Step
from advalign.training.train import train

RECIPE = Recipe(epochs=2, lr=0.1, schedule="constant", weight_decay=0.0, precision="fp16", awp=0.005)


def stepped(method: str, recipe: Recipe, factor: float | None = None) -> Step:
    """A step on a batch whose adversarial images are the same in every precision."""
    step = Step(bound(method), recipe, 4, torch.device("cpu"))
    if factor is not None:
        assert step.loss_scale is not None
        step.loss_scale.load({**step.loss_scale.state(), "scale": factor})
    step.schedule(0)
    x, y = batch(8)
    torch.manual_seed(0)
    step.update(x, (x + 0.03 * torch.randn_like(x).sign()).clamp(0, 1), y, None)
    return step


def gradients(step: Step) -> Tensor:
    """After the first step, the momentum is the gradient."""
    return torch.cat([state["momentum_buffer"].flatten() for state in step.optimizer.state.values()])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", ["at", "trades+vfd"])
def test_the_gradients_are_those_of_fp32(method: str, precision: str):
    """Within 32 units in the last place of what the layers' outputs are held in, 2^-8 and 2^-11: BatchNorm's backward
    pass takes the difference of nearly equal sums."""
    recipes = replace(RECIPE, precision="fp32"), replace(RECIPE, precision=precision)  # pyright: ignore[reportArgumentType]
    exact, mixed = (gradients(stepped(method, recipe)) for recipe in recipes)
    assert (mixed - exact).norm() < 32 * (2**-8 if precision == "bf16" else 2**-11) * exact.norm()


def test_a_loss_too_small_for_fp16_has_gradients_all_the_same():
    """By a factor without scaling almost all are below fp16's least number; with it, they are as in fp32."""
    found = {}
    for factor in (1.0, 2.0**16):
        step = stepped("at", replace(RECIPE, awp=0.0), factor)
        step.optimizer.zero_grad()
        x, y = batch(8)
        assert step.loss_scale is not None
        with torch.autocast("cpu", torch.float16):
            loss = 1e-6 * torch.nn.functional.cross_entropy(step.objective.student(x).half(), y)
        step.loss_scale.scaled(loss).backward()
        step.loss_scale.unscale()
        weight = next(step.objective.student.parameters())
        assert weight.grad is not None
        found[factor] = (weight.grad == 0).double().mean().item()
    assert found[1.0] > 0.9
    assert found[2.0**16] < 0.1


@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_step_that_overflows_is_left_out_and_the_next_ones_are_not(clip: float | None):
    """Also the very first, and with perturbed weights, which come back as they were."""
    recipe = replace(RECIPE, clip_norm=clip)
    before = [parameter.detach().clone() for parameter in bound("at").parameters()]
    step = stepped("at", recipe, 2.0**40)
    assert step.loss_scale is not None
    for one, other in zip(before, step.objective.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert not gradients(step).any()
    assert step.loss_scale.state()["scale"] == 2.0**39
    x, y = batch(8)
    for at in range(1, 40):
        step.schedule(at)
        step.update(x, x, y, None)
    left_out = step.loss_scale.take_skipped()
    assert 10 < left_out < 39
    assert step.loss_scale.state()["scale"] == 2.0 ** (40 - left_out)
    assert step.loss_scale.take_skipped() == 0
    assert all(parameter.isfinite().all() for parameter in step.objective.parameters())
    assert gradients(step).any()


def test_a_run_in_fp16_that_is_stopped_after_every_step_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With a factor that overflows at first, and grows again after two steps, so that it is told from a new one."""
    monkeypatch.setattr("torch.amp.GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**26, growth_interval=2))
    recipe = replace(digits(), epochs=2, subset=128, batch_size=64, validation=20, steps=1, precision="fp16")
    options = {"data": "digits", "model": "small-cnn(width=2)", "recipe": recipe, "device": "cpu"}
    whole = train("at", **options, runs=tmp_path / "a")
    while not (run := train("at", **options, runs=tmp_path / "b", time_budget=0.001)).finished:
        pass
    assert_same_run(whole.path, run.path)
    assert 0 < whole.log[0]["skipped_steps"] <= 2


def test_a_state_without_the_factor_is_refused():
    weight = torch.nn.Parameter(torch.ones(2))
    scale = LossScale(torch.optim.SGD([weight], 0.1, momentum=0.9, fused=True), torch.device("cpu"))
    for state in ({}, {**scale.state(), "scale": float("nan")}, {**scale.state(), "_growth_tracker": -1}):
        with pytest.raises((KeyError, ValueError)):
            scale.load(state)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["at", "trades"])
def test_precisions_train_to_accuracies_within_noise(method: str, tmp_path: Path):
    """On digits, against the spread of three seeds."""
    found: dict[str, list[list[float]]] = {}
    for precision in ("fp32", "bf16", "fp16"):
        for seed in range(3):
            recipe = replace(digits(), epochs=4, subset=512, seed=seed, precision=precision)
            run = train(method, data="digits", model="small-cnn(width=8)", recipe=recipe, runs=tmp_path, device="cpu")
            found.setdefault(precision, []).append(list(run.log[-1]["validation"].values()))
    means = {precision: torch.tensor(rows).mean(0) for precision, rows in found.items()}
    noise = torch.tensor(found["fp32"]).std(0).clamp_min(0.01)
    for precision in ("bf16", "fp16"):
        assert ((means[precision] - means["fp32"]).abs() < 2 * noise).all(), means
