"""The cheap training attacks beside the authors' loops in plain PyTorch, and with every part of a method."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.networks import tiny
from tests.objectives.short_training import bound, combinations, every_part_quick
from tests.samples import batch
from tests.training.same_runs import assert_same_run
from torch import Tensor, nn

from advalign.data import Batches, Images, load
from advalign.errors import UserError
from advalign.objectives import Objective, parse
from advalign.threats import Linf
from advalign.training.attacks import ATTA, FGSMPGI, FGSMRS, NFGSM, Batch, Free, check_attack, training_attack
from advalign.training.loop import _Trainer
from advalign.training.planning import plan
from advalign.training.recipes import Recipe, digits
from advalign.training.step import Step
from advalign.training.train import train

EPS = 0.1
KL_BASES = ("trades", "hat", "trades+vfd")


def slope(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(net(x), y), x)[0]


def n_fgsm(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loop of de Jorge et al.: noise in twice the ball, a step of eps, and no projection but to [0, 1]."""
    noisy = (x + torch.empty_like(x).uniform_(-2 * EPS, 2 * EPS)).clamp(0, 1)
    return (noisy + EPS * slope(net.train(), noisy, y).sign()).clamp(0, 1)


def fgsm_rs(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loop of Wong et al.: noise in the ball, a step of 1.25 eps, projected."""
    delta = torch.empty_like(x).uniform_(-EPS, EPS)
    delta = (x + delta).clamp(0, 1) - x
    delta = (delta + 1.25 * EPS * slope(net.train(), x + delta, y).sign()).clamp(-EPS, EPS)
    return (x + delta).clamp(0, 1)


@pytest.mark.parametrize(("attack", "authors"), [(NFGSM(), n_fgsm), (FGSMRS(), fgsm_rs)], ids=["n-fgsm", "fgsm-rs"])
def test_one_step_is_that_of_the_authors(attack: NFGSM | FGSMRS, authors: Callable[..., Tensor]):
    objective = Objective(parse("at"), tiny(0).double(), {}).train()
    x, y = batch(16)
    x = x.double()
    theirs = copy.deepcopy(objective.student)
    torch.manual_seed(3)
    expected = authors(theirs, x, y)
    torch.manual_seed(3)
    found = attack.perturb(objective, Batch(x, y), Linf(EPS), None, None)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert_same_buffers(objective.student, theirs)


def assert_same_buffers(first: nn.Module, second: nn.Module) -> None:
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        torch.testing.assert_close(a, b)


def test_only_n_fgsm_leaves_the_ball_and_at_most_to_three_radii():
    objective, (x, y) = bound("at"), batch(64)
    x = 0.4 + 0.2 * x  # far from 0 and 1
    for name, furthest in (("n-fgsm", 3 * EPS), ("fgsm-rs", EPS)):
        moved = training_attack(Recipe(attack=name)).perturb(objective, Batch(x, y), Linf(EPS), None, None) - x
        assert furthest - 0.01 < moved.abs().max() <= furthest + 1e-6


def test_free_is_the_authors_loop():
    """Shafahi et al.: each batch m times, one backward pass for weights and images, the perturbation handed on."""
    recipe = Recipe(epochs=1, lr=0.05, schedule="constant", eps=EPS, attack="free(m=3)")
    objective = Objective(parse("at"), tiny(0).double(), {}).train()
    net = copy.deepcopy(objective.student)
    step = Step(objective, recipe, 6, torch.device("cpu"))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    batches = [(x.double(), y) for x, y in (batch(8), (batch(16)[0][8:], batch(16)[1][8:]))]
    torch.manual_seed(5)
    delta = torch.empty_like(batches[0][0]).uniform_(-EPS, EPS)
    torch.manual_seed(5)
    at = 0
    for x, y in batches:
        for _ in range(3):
            step.schedule(at)
            step.update(x, step.perturb(x, y, None), y, None)
            at += 1
            noise = delta.clone().requires_grad_()
            loss = F.cross_entropy(net((x + noise).clamp(0, 1)), y)
            optimizer.zero_grad()
            loss.backward()
            assert noise.grad is not None
            delta = (delta + EPS * noise.grad.sign()).clamp(-EPS, EPS)
            optimizer.step()
    for mine, theirs in zip(objective.student.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)


def images(n: int = 24) -> Images:
    x, y = batch(n)
    return Images((255 * x).to(torch.uint8), y)


@pytest.mark.parametrize("augment", ["flip-crop", "flip", "none"])
def test_atta_goes_on_in_the_frame_of_each_image(augment: str):
    """Beside a loop over single images, whose frames are padded, cropped and mirrored by slices."""
    data, pad = images(), 4 * (augment == "flip-crop")
    batches = Batches(data, 8, augment=augment, seed=1)
    objective = Objective(parse("at"), tiny(0).double(), {}).train()
    attack = ATTA(steps=1, step=0.5, reset=2)
    kept = torch.zeros(24, 3, 8 + 2 * pad, 8 + 2 * pad, dtype=torch.float16)
    for epoch in range(4):
        attack.start_epoch(epoch, 4)
        kept *= epoch % 2  # forgotten in every second epoch
        order, flipped, corners, _ = batches._draw(epoch, view=0)
        for k, ((pixels, y), placed) in enumerate(zip(batches.epoch(epoch), batches.placements(epoch), strict=True)):
            x = pixels.double()
            rows = order[8 * k : 8 * k + 8]
            assert torch.equal(placed.rows, rows)

            def crop(frame: Tensor, row: int, k: int = k) -> Tensor:
                down, across = corners[8 * k + row].tolist()
                part = frame[:, down : down + 8, across : across + 8]
                return part.flip(2) if flipped[8 * k + row] else part

            before = torch.stack([crop(kept[row], number) for number, row in enumerate(rows.tolist())]).double()
            torch.manual_seed(9)
            noise = torch.zeros_like(x) if epoch % 2 else 0.001 * torch.randn_like(x)
            start = x + before + noise
            expected = start + 0.5 * EPS * slope(objective.student.eval(), start, y).sign()
            expected = torch.minimum(torch.maximum(expected, x - EPS), x + EPS).clamp(0, 1)
            objective.train()
            torch.manual_seed(9)
            found = attack.perturb(objective, Batch(x, y, None, placed), Linf(EPS), None, None)
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
            for number, row in enumerate(rows.tolist()):
                down, across = corners[8 * k + number].tolist()
                delta = (expected - x)[number].half()
                delta = delta.flip(2) if flipped[8 * k + number] else delta
                kept[row][:, down : down + 8, across : across + 8] = delta
    assert attack.deltas is not None
    torch.testing.assert_close(attack.deltas, kept, atol=1e-4, rtol=0)


def test_fgsm_pgi_is_the_authors_loop():
    """Three epochs beside FGSM_MEP.py: momenta by the sum of the batch's gradients, everything kept in fp32."""
    data, objective = images(), Objective(parse("at"), tiny(0).double(), {}).train()
    net, attack = copy.deepcopy(objective.student), FGSMPGI(reset=3)
    batches = Batches(data, 8, augment="flip-crop", seed=1)
    all_delta, all_momentum = torch.zeros(24, 3, 8, 8).double(), torch.zeros(24, 3, 8, 8).double()
    for epoch in range(3):
        attack.start_epoch(epoch, 3)
        for (pixels, y), placed in zip(batches.epoch(epoch), batches.placements(epoch), strict=True):
            x, rows = pixels.double(), placed.rows
            torch.manual_seed(4)
            found = attack.perturb(objective, Batch(x, y, None, placed), Linf(EPS), None, None)
            torch.manual_seed(4)
            delta = all_delta[rows] if epoch else EPS * torch.randn_like(x).sign()
            grad = slope(net.train(), x + delta, y)
            momentum = grad / grad.norm(p=1) + 0.3 * all_momentum[rows]
            following = (delta + EPS * momentum.sign()).clamp(-EPS, EPS)
            all_delta[rows] = torch.minimum(torch.maximum(following, -x), 1 - x)
            all_momentum[rows] = momentum
            expected = (x + (delta + EPS * grad.sign()).clamp(-EPS, EPS)).clamp(0, 1)
            assert ((found - expected).abs() < 1e-4).double().mean() > 0.999  # but where a gradient is nearly zero
    assert attack.deltas is not None
    assert ((attack.deltas - all_delta).abs() < 1e-4).double().mean() > 0.99
    for mine, theirs in zip(objective.student.buffers(), net.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=0)
    assert (all_delta.abs() < 0.01 * EPS).double().mean() > 0.1  # gradients that changed their mind


def test_after_fgsm_pgi_the_regulariser_ties_the_logits_at_both_ends_of_the_step():
    objective, (x, y) = bound("at+pgi(weight=3)").double(), batch(8)
    x, batches = x.double(), Batches(images(8), 8, augment="none", seed=0)
    step = Step(objective, Recipe(epochs=2, attack="fgsm-pgi", eps=EPS), 1, torch.device("cpu"))
    placed = next(batches.placements(0))
    torch.manual_seed(0)
    x_adv = step.perturb(x, y, None, placed)
    torch.manual_seed(0)
    start = x + EPS * torch.randn_like(x).sign()
    net = objective.student.train()
    expected = 3 * (net(x_adv) - net(start)).square().mean()
    term = objective(x, x_adv, y)["pgi"]
    torch.testing.assert_close(term.weight * term.value, expected)
    assert (x_adv - start).abs().amax() > EPS


def test_atta_forgets_now_and_then():
    attack = ATTA(reset=3)
    fresh = []
    for epoch in range(7):
        attack.start_epoch(epoch, 7)
        fresh.append(attack.fresh)
    assert fresh == [True, False, False, True, False, False, True]


@pytest.mark.parametrize("attack", ["n-fgsm", "fgsm-rs"])
@pytest.mark.parametrize("base", KL_BASES)
def test_a_single_step_climbs_the_losses_that_are_flat_at_the_clean_images(base: str, attack: str):
    objective, (x, y) = bound(base), batch(256)
    made = training_attack(Recipe(attack=attack))
    torch.manual_seed(0)
    climbed = made.perturb(objective, Batch(x, y), Linf(EPS), None, "eval")
    torch.manual_seed(0)
    noise = 2 if attack == "n-fgsm" else 1
    start = (x + noise * torch.empty_like(x).uniform_(-EPS, EPS)).clamp(0, 1)
    net = objective.student.eval()
    kl = [F.kl_div(net(z).log_softmax(1), net(x).softmax(1), reduction="batchmean") for z in (start, climbed)]
    assert kl[1] > 1.1 * kl[0]


@pytest.mark.parametrize("base", ["trades", "hat"])
def test_free_moves_where_the_loss_is_flat_at_the_clean_images(base: str):
    recipe = Recipe(epochs=1, lr=0.01, schedule="constant", eps=EPS, attack="free(m=4)")
    objective, (x, y) = bound(base), batch(32)
    x = 0.2 + 0.6 * x
    step = Step(objective, recipe, 4, torch.device("cpu"))
    for at in range(4):
        step.schedule(at)
        step.update(x, step.perturb(x, y, None), y, None)
    assert isinstance(step.attack, Free)
    assert step.attack.delta is not None
    assert (step.attack.delta.abs() > 0.99 * EPS).double().mean() > 0.5  # by whole radii, from corner to corner


@pytest.mark.parametrize(
    "attack",
    ["free(m=2)", *(pytest.param(each, marks=pytest.mark.slow) for each in ("n-fgsm", "fgsm-rs", "atta", "fgsm-pgi"))],
)
@pytest.mark.parametrize("method", every_part_quick([*combinations(0), *combinations(1)]))
def test_every_part_makes_a_step_with_every_attack(method: str, attack: str):
    objective = bound(method)
    recipe = Recipe(epochs=2, lr=0.01, schedule="constant", eps=EPS, attack=attack)
    made = training_attack(recipe)
    by_radius = attack in ("free(m=2)", "n-fgsm", "fgsm-pgi")
    by_pixel = objective.method.replacing("threat") is not None and by_radius
    nowhere = any(plugin.reads_start for plugin in objective.method.plugins) and attack in ("free(m=2)", "n-fgsm")
    if by_pixel or nowhere or (made.remembers and objective.method.augmentations > 1):
        with pytest.raises(UserError, match=r"attacks several augmentations|decides it by pixel|does not tell"):
            check_attack(made, objective.method, recipe, extra=False)
        return
    if not objective.method.defends:
        return
    step = Step(objective, recipe, 1, torch.device("cpu"))
    batches = Batches(images(8), 8, augment="flip-crop", seed=0)
    (x, y), placed = next(batches.epoch(0)), next(batches.placements(0))
    second = torch.cat([x.flip(3)] * objective.method.further) if objective.method.second else None
    step.schedule(0)
    x_adv = step.perturb(x, y, second, placed)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    loss, _ = step.update(x, x_adv, y, second, torch.arange(8))
    assert loss.isfinite()


def test_batches_are_replayed_in_a_row_and_all_come(tmp_path: Path):
    recipe = replace(digits(), epochs=6, attack="free(m=3)", subset=256, batch_size=64, validation=40)
    data, runs = load("digits"), tmp_path
    planned = plan(parse("at"), data, "small-cnn(width=2)", recipe, runs=runs, guests={})
    trainer = _Trainer(planned, torch.device("cpu"), cuda_graphs=False)
    seen = []
    for epoch in range(6):
        trainer.state.epoch, trainer.state.step = epoch, 0
        seen += [batch.x for batch in trainer.remaining_batches()]
        trainer.state.step = 2
        rest = [batch.x for batch in trainer.remaining_batches()]
        assert all(map(torch.equal, rest, seen[-2:]))
        assert len(rest) == 2
    assert len(seen) == 24
    assert all(torch.equal(seen[k], seen[3 * (k // 3)]) for k in range(24))
    for first in (0, 12):  # three epochs are one walk through the images
        walk = torch.cat(seen[first : first + 12 : 3]).flatten(1)
        assert len(walk.unique(dim=0)) > 250


@pytest.mark.parametrize(
    "attack",
    ["free(m=3)", *(pytest.param(each, marks=pytest.mark.slow) for each in ("atta(reset=2)", "fgsm-pgi(reset=2)"))],
)
def test_a_run_that_is_stopped_after_every_step_is_the_same(attack: str, tmp_path: Path):
    recipe = replace(digits(), epochs=2, attack=attack, subset=256, batch_size=64, validation=20, augment="flip-crop")
    data = {"data": "digits", "model": "small-cnn(width=2)", "recipe": recipe, "device": "cpu"}
    whole = train("at", **data, runs=tmp_path / "a")
    calls = 1
    while not (run := train("at", **data, runs=tmp_path / "b", time_budget=0.001)).finished:
        calls += 1
        assert calls < 60
    assert calls > 2
    assert_same_run(whole.path, run.path)


def test_steps_change_by_parts_of_the_training():
    attack = training_attack(Recipe(epochs=9, steps="2:5:10"))
    steps = []
    for epoch in range(9):
        attack.start_epoch(epoch, 9)
        steps.append(vars(attack)["steps"])
    assert steps == [2] * 3 + [5] * 3 + [10] * 3
    assert Recipe(steps="7") == Recipe(steps=7)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"attack": "n-fgms"}, "n-fgsm"),
        ({"attack": "free(m=0)"}, "m=0 must be in 1 to 100"),
        ({"attack": "n-fgsm(step=3)"}, "step=3 must be above 0 and at most 2"),
        ({"attack": "pgd(steps=3)"}, "--steps, --step-size and --start"),
        ({"attack": "n-fgsm+free"}, "choose one"),
        ({"attack": "atta", "augment": "cropshift"}, "augment=cropshift must be one of none, flip, flip-crop"),
        ({"attack": "free", "average": "none", "method": "trades+dajat"}, "attacks several augmentations"),
        ({"attack": "n-fgsm", "method": "at+pgi"}, "pgi reads where the attack starts"),
        ({"attack": "fgsm-pgi(decay=1)"}, "decay=1 must be at least 0 and below 1"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused_before_any_work(recipe: dict[str, object], words: str, tmp_path: Path):
    recipe = dict(recipe)
    method = str(recipe.pop("method", "at"))
    made = replace(digits(), **recipe)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=words):
        train(method, data="digits", model="small-cnn(width=2)", recipe=made, runs=tmp_path, device="cpu")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "words"), [("2:0", "at least 1"), ("two", "2:5:10"), ("1:2:3", "more than epochs")])
def test_steps_that_are_none_are_refused(steps: str, words: str):
    with pytest.raises(UserError, match=words):
        Recipe(epochs=2, steps=steps)


def test_spellings_of_one_attack_name_one_run_and_what_it_does_not_use_names_none(tmp_path: Path):
    def name(**changes: object) -> str:
        recipe = replace(digits(), epochs=2, subset=128, **changes)  # pyright: ignore[reportArgumentType]
        return plan(parse("at"), load("digits"), "small-cnn(width=2)", recipe, runs=tmp_path, guests={}).run.id

    assert name(attack="n-fgsm") == name(attack="n-fgsm", guard=True) != name(attack="n-fgsm", guard=False)
    assert name() == name(guard=False) == name(attack=" pgd()") == name(steps="7:7")
    assert name(steps="2:05") == name(steps="2:5")
    assert name(attack="free") == name(attack="free(m=8)", steps=3) != name(attack="free(m=4)")
    assert name() == name(attack="pgd") != name(steps=3)
