"""Averages of the weights: their values, their BatchNorm, and that the student comes back to the bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from tests.networks import TinyNet, tiny
from torch import nn

from advalign.data import Batches, Images
from advalign.data.batches import Epoch
from advalign.objectives import Objective, compose, parse
from advalign.training.averaging import Average
from advalign.training.recipes import Recipe

RECIPE = Recipe(epochs=4, eps=0.1, steps=2)


def epoch(n: int = 32) -> Epoch:
    draw = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(256, (n, 3, 8, 8), generator=draw, dtype=torch.uint8), torch.randint(4, (n,), generator=draw)
    )
    return Epoch(Batches(images, 8, augment="none", seed=0), 0)


def objective(method: str = "at") -> Objective:
    return compose(parse(method), student=tiny(0)).train()


def walk(of: Objective, average: Average, steps: int) -> list[list[torch.Tensor]]:
    """Move the student at random; return where it was after each step."""
    seen = []
    for done in range(1, steps + 1):
        with torch.no_grad():
            for p in of.student.parameters():
                p.add_(torch.randn_like(p))
        seen.append([p.detach().clone() for p in of.student.parameters()])
        average.update(done)
    return seen


def test_swa_is_the_mean_of_the_weights_it_takes_in():
    of = objective()
    average = Average(of, replace(RECIPE, average="swa", average_start=0.5, swa_every=2), steps=4)
    seen = walk(of, average, 16)
    taken = [seen[done - 1] for done in (10, 12, 14, 16)]
    for mine, *theirs in zip(average.weights, *taken, strict=True):
        torch.testing.assert_close(mine, torch.stack(theirs).mean(0))
    assert average.count == 4


def test_swa_takes_one_in_an_epoch_and_begins_in_the_middle_by_default():
    of = objective()
    average = Average(of, replace(RECIPE, average="swa"), steps=4)
    seen = walk(of, average, 16)
    for mine, a, b in zip(average.weights, seen[11], seen[15], strict=True):
        torch.testing.assert_close(mine, (a + b) / 2)


def test_ema_follows_gowals_recursion():
    of = objective()
    expected = [p.detach().clone() for p in of.student.parameters()]
    average = Average(of, replace(RECIPE, average="ema", ema_decay=0.5), steps=4)
    for t, weights in enumerate(walk(of, average, 12)):
        decay = min(0.5, (1 + t) / (10 + t))
        expected = [decay * e + (1 - decay) * w for e, w in zip(expected, weights, strict=True)]
    for mine, theirs in zip(average.weights, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_ema_with_a_late_start_begins_from_the_student_and_not_from_its_initial_weights():
    of = objective()
    average = Average(of, replace(RECIPE, average="ema", ema_decay=0.9, average_start=0.5), steps=4)
    seen = walk(of, average, 10)
    share = 1 - 2 / 11  # of the second update; that of the first is 9/10
    for mine, start, first, second in zip(average.weights, seen[7], seen[8], seen[9], strict=True):
        torch.testing.assert_close(mine, (1 - share) * (0.1 * start + 0.9 * first) + share * second)


def test_ema_of_epochs_takes_one_snapshot_an_epoch_as_ikls_authors_do():
    of = objective()
    average = Average(of, replace(RECIPE, average="ema", ema_decay=0.9, ema_epochs=True), steps=4)
    seen = walk(of, average, 13)
    for mine, *snapshots in zip(average.weights, seen[3], seen[7], seen[11], strict=True):
        expected = snapshots[0]
        for snapshot in snapshots[1:]:
            expected = 0.9 * expected + 0.1 * snapshot
        torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("kind", ["ema", "swa"])
@pytest.mark.parametrize("method", ["at", "at+ar-at"])
def test_the_student_comes_back_to_the_bit(kind: str, method: str):
    of = objective(method)
    average = Average(of, replace(RECIPE, average=kind, average_start=0.0, swa_every=1), steps=4)
    walk(of, average, 3)
    before = copy.deepcopy(of.state_dict())
    with average.applied(epoch()) as student:
        within = dict(student.named_parameters())
        assert not torch.equal(within["fc.weight"], before["nets.student.net.fc.weight"])
    assert all(torch.equal(value, before[key]) for key, value in of.state_dict().items())
    assert of.student.training
    assert all(m.momentum == 0.1 for m in of.modules() if isinstance(m, nn.BatchNorm2d))


def test_swa_estimates_batchnorm_anew_on_clean_images():
    of = objective()
    average = Average(of, replace(RECIPE, average="swa", average_start=0.0, swa_every=1), steps=4)
    walk(of, average, 3)
    batches = epoch()
    with average.applied(batches) as student:
        assert isinstance(student, TinyNet)
        conv, norm = student.layer1[0], student.layer1[1]
        maps = [conv(x) for x, _ in batches]
        mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
        var = torch.stack([m.var((0, 2, 3)) for m in maps]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)


def test_ar_at_estimates_its_adversarial_norms_on_adversarial_images():
    """What its exported network says on average over x' is centred, and on clean images it is not."""
    of = objective("at+ar-at")
    average = Average(of, replace(RECIPE, average="swa", average_start=0.0, swa_every=1, eps=0.3), steps=4)
    walk(of, average, 3)
    torch.manual_seed(0)
    with average.applied(epoch(256)) as student:
        assert isinstance(student, TinyNet)
        norm = student.layer1[1]
        clean = torch.cat([student.layer1[0](x) for x, _ in epoch(256)])
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert (norm.running_mean - clean.mean((0, 2, 3))).abs().max() > 1e-3


def test_without_an_average_the_student_itself_is_applied():
    of = objective()
    average = Average(of, RECIPE, steps=4)
    walk(of, average, 3)
    assert average.weights == []
    with average.applied(epoch()) as student:
        assert student is of.student


def test_ema_of_a_constant_decay_has_it_from_its_first_step_on():
    of = objective()
    expected = [p.detach().clone() for p in of.student.parameters()]
    average = Average(of, replace(RECIPE, average="ema", ema_decay=0.75, ema_constant=True), steps=4)
    for weights in walk(of, average, 5):
        expected = [0.75 * mine + 0.25 * live for mine, live in zip(expected, weights, strict=True)]
    for mine, theirs in zip(average.weights, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
