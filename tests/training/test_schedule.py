"""Learning rate and momentum of every step, against torch's schedulers and the epochs that the papers' code names."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from advalign.errors import UserError
from advalign.training.recipes import RECIPES, Recipe
from advalign.training.schedule import learning_rate, momentum


def followed(
    steps: int, lr: float, make: Callable[[torch.optim.Optimizer], LRScheduler]
) -> Iterator[tuple[float, float]]:
    """Yield torch's learning rate and momentum of each step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr, momentum=0.9)
    scheduler = make(optimizer)
    for step in range(steps):
        yield optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]
        optimizer.step()
        if step < steps - 1:
            scheduler.step()


@settings(deadline=None, max_examples=30)
@given(
    epochs=st.integers(1, 9),
    per_epoch=st.integers(1, 9),
    peak=st.floats(0.05, 0.95),
    lr=st.floats(1e-3, 1),
    swings=st.booleans(),
)
def test_one_cycle_is_torchs(epochs: int, per_epoch: int, peak: float, lr: float, swings: bool):
    steps = epochs * per_epoch
    turn = peak * steps - 1
    if turn <= 0.01:  # torch divides by it; see the test below
        return
    recipe = Recipe(epochs=epochs, schedule="onecycle", lr=lr, peak=peak, cycle_momentum=swings)
    theirs = followed(steps, lr, lambda o: OneCycleLR(o, lr, total_steps=steps, pct_start=peak, cycle_momentum=swings))
    for step, (rate, swung) in enumerate(theirs):
        assert learning_rate(recipe, step, per_epoch) == pytest.approx(rate, rel=1e-9, abs=1e-12)
        assert momentum(recipe, step, per_epoch) == pytest.approx(swung, rel=1e-9)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 8])
def test_one_cycle_of_a_few_steps_ends_at_the_end(steps: int):
    """With 4 steps and a peak at 1/4 torch divides by zero."""
    recipe = Recipe(epochs=1, schedule="onecycle", lr=1.0, cycle_momentum=True)
    rates = [learning_rate(recipe, step, steps) for step in range(steps)]
    assert rates[-1] == pytest.approx(1 / 25e4)
    assert all(0 < rate <= 1 for rate in rates)
    assert all(0.85 <= momentum(recipe, step, steps) <= 0.95 for step in range(steps))
    if steps == 4:
        assert rates[0] == 1.0


@pytest.mark.parametrize("per_epoch", [1, 7])
def test_cosine_is_torchs_stepped_each_iteration(per_epoch: int):
    recipe = Recipe(epochs=6, schedule="cosine", lr=0.3)
    steps = 6 * per_epoch
    theirs = followed(steps, 0.3, lambda o: CosineAnnealingLR(o, T_max=steps))
    for step, (rate, unmoved) in enumerate(theirs):
        assert learning_rate(recipe, step, per_epoch) == pytest.approx(rate, rel=1e-9)
        assert momentum(recipe, step, per_epoch) == unmoved


# Epochs from 1, as the papers' code counts: the first epoch of each rate.
DROPS = {
    "common": {1: 0.1, 101: 0.01, 106: 0.001},
    "trades": {1: 0.1, 75: 0.01},
    "mart": {1: 0.01, 75: 0.001, 90: 0.0001, 100: 0.00001},
    "rice": {1: 0.1, 101: 0.01, 151: 0.001},
    "awp": {1: 0.1, 101: 0.01, 151: 0.001},
    "trades-awp": {1: 0.1, 100: 0.01, 150: 0.001},
    "kd": {1: 0.1, 51: 0.01, 151: 0.001},
    "lbgat": {1: 0.02, 2: 0.1, 76: 0.01, 91: 0.001},
    "ar-at": {1: 0.02, 2: 0.1, 77: 0.01, 92: 0.001},
    "part": {1: 0.01, 80: 0.001},
    "ard": {1: 0.01, 101: 0.001},
    "iad": {1: 0.1, 101: 0.01},
    "rslad": {1: 0.01, 216: 0.001, 261: 0.0001, 286: 0.00001},
    "adaad": {1: 0.01, 101: 0.001, 151: 0.0001},
    "score": {1: 0.05, 101: 0.005, 106: 0.0005},
    "adr": {1: 0.1, 101: 0.01, 151: 0.001},
    "adaiad": {1: 0.1, 101: 0.01, 151: 0.001},
    "rpat": {1: 0.1, 101: 0.01, 151: 0.001},
    "tiny-imagenet": {1: 0.1, 51: 0.01, 76: 0.001},
    "rebat": {1: 0.1, 101: 0.1 / 1.5, 151: 0.1 / 1.5**2},
}


def test_every_piecewise_preset_is_checked():
    assert set(DROPS) == {name for name, make in RECIPES.items() if make().schedule == "piecewise"}


@pytest.mark.parametrize("name", DROPS)
def test_piecewise_drops_with_the_epochs_of_the_papers(name: str):
    recipe, per_epoch = RECIPES[name](), 3
    assert max(DROPS[name]) <= recipe.epochs
    for epoch in range(1, recipe.epochs + 1):
        expected = DROPS[name][max(first for first in DROPS[name] if first <= epoch)]
        for step in range(per_epoch):
            at = (epoch - 1) * per_epoch + step
            assert learning_rate(recipe, at, per_epoch) == pytest.approx(expected, rel=1e-12)
            assert momentum(recipe, at, per_epoch) == 0.9


def test_generalists_rate_is_its_codes_line_by_line():
    recipe = RECIPES["generalist"]()
    for epoch in range(1, 121):  # as the code counts
        if epoch <= 40:
            expected = 0.01
        elif epoch <= 80:
            expected = 0.01 + (epoch - 40) / 40 * (0.001 - 0.01)
        else:
            expected = 0.001 + (epoch - 80) / 40 * (0.0001 - 0.001)
        for step in range(3):
            assert learning_rate(recipe, 3 * (epoch - 1) + step, 3) == pytest.approx(expected, rel=1e-9)


def test_lines_that_do_not_go_forward_are_refused():
    for milestones in ((0.5, 0.25), (0.5, 0.5), ()):
        with pytest.raises(UserError, match=r"must rise: schedule=linear bends at each"):
            Recipe(schedule="linear", milestones=milestones)


@given(st.integers(1, 400).flatmap(lambda epochs: st.tuples(st.just(epochs), st.integers(1, epochs))))
def test_a_milestone_written_as_a_share_drops_exactly_at_its_epoch(drawn: tuple[int, int]):
    epochs, drop = drawn
    recipe = Recipe(epochs=epochs, lr=1.0, milestones=(drop / epochs,))
    rates = [learning_rate(recipe, epoch, 1) for epoch in range(epochs)]
    assert rates == [1.0] * drop + [0.1] * (epochs - drop)


@pytest.mark.parametrize("schedule", ["piecewise", "linear", "cosine", "onecycle", "constant"])
def test_warmup_is_a_fifth_for_whole_epochs_and_then_the_schedules_own(schedule):
    cold = Recipe(epochs=10, lr=0.1, schedule=schedule)
    warm = Recipe(epochs=10, lr=0.1, schedule=schedule, warmup=2)
    for step in range(50):
        expected = 0.02 if step < 10 else learning_rate(cold, step, 5)
        assert learning_rate(warm, step, 5) == pytest.approx(expected)


def test_constant_stays():
    recipe = Recipe(epochs=3, lr=0.07, schedule="constant", momentum=0.5)
    assert {learning_rate(recipe, step, 4) for step in range(12)} == {0.07}
    assert {momentum(recipe, step, 4) for step in range(12)} == {0.5}


@pytest.mark.parametrize("name", RECIPES)
def test_every_preset_has_a_finite_rate_at_every_step(name: str):
    recipe = RECIPES[name]()
    for per_epoch in (1, 2):
        for step in range(recipe.epochs * per_epoch):
            assert 0 < learning_rate(recipe, step, per_epoch) <= recipe.lr * (1 + 1e-12)
            assert math.isfinite(momentum(recipe, step, per_epoch))
