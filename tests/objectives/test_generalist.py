"""Generalist against a plain loop: two networks with an SGD each, one average, and what is handed back when."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.networks import tiny
from tests.samples import batch
from torch import nn

from advalign.data import load
from advalign.data.batches import Epoch
from advalign.errors import UserError
from advalign.objectives import Objective, compose, parse, total
from advalign.threats import Linf
from advalign.training.averaging import Average
from advalign.training.planning import plan
from advalign.training.recipes import Recipe

EPOCHS, STEPS, LR, MOMENTUM, DECAY = 12, 2, 0.05, 0.9, 5e-4
METHOD = "at+generalist(begin=0.5, every=2, share_end=0.4, decay=0.4)"


def bound(method: str = METHOD) -> Objective:
    return compose(parse(method), student=tiny(0), natural=tiny(1)).double().train()


def values(net: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and statistics of BatchNorm by name, as a copy."""
    return {key: value.clone() for key, value in net.state_dict().items() if value.is_floating_point()}


def sgd(objective: Objective) -> torch.optim.SGD:
    return torch.optim.SGD(objective.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY)


def go(objective: Objective, optimizer: torch.optim.SGD, epochs: range) -> None:
    x, y = batch()
    x, x_adv = x.double(), x.double().flip(2)
    for epoch in epochs:
        objective.start_epoch([(x, y)], epoch / EPOCHS)
        for _ in range(STEPS):
            optimizer.zero_grad()
            total(objective(x, x_adv, y)).backward()
            optimizer.step()
            objective.after_update()


def plain(epochs: int) -> tuple[nn.Module, nn.Module, dict[str, torch.Tensor]]:
    """The paper's loop, written out: the robust learner, the natural one, and the average."""
    x, y = batch()
    x, x_adv = x.double(), x.double().flip(2)
    robust, natural = tiny(0).double().train(), tiny(1).double().train()
    learners = [
        (net, images, torch.optim.SGD(net.parameters(), LR, momentum=MOMENTUM, weight_decay=DECAY))
        for net, images in ((robust, x_adv), (natural, x))
    ]
    average, t = values(robust), 0
    for epoch in range(epochs):
        if epoch in (6, 8, 10):
            for net in (robust, natural):
                net.load_state_dict({**net.state_dict(), **average})
        b = {9: 0.85, 10: 0.7, 11: 0.55}.get(epoch, 1.0)
        for _ in range(STEPS):
            for net, images, optimizer in learners:
                optimizer.zero_grad()
                F.cross_entropy(net(images), y).backward()
                optimizer.step()
            d = min(0.4, (1 + t) / (10 + t))
            f, g = values(robust), values(natural)
            average = {key: d * average[key] + (1 - d) * (b * f[key] + (1 - b) * g[key]) for key in average}
            t += 1
    return robust, natural, average


@pytest.mark.parametrize("epochs", [6, 7, EPOCHS])
def test_learners_average_and_hand_back_are_those_of_the_papers_loop(epochs: int):
    objective = bound()
    go(objective, sgd(objective), range(epochs))
    robust, natural, average = plain(epochs)
    for net, expected in (
        (objective.student, values(robust)),
        (objective.nets.get_submodule("natural.net"), values(natural)),
        (objective.exported_student(), average),
    ):
        torch.testing.assert_close(values(net), expected, rtol=1e-10, atol=1e-12)
    assert objective.exported_student() is objective.average is not objective.student


def test_at_the_hand_back_the_three_networks_are_equal_and_the_momentum_stays():
    objective = bound()
    optimizer = sgd(objective)
    go(objective, optimizer, range(6))
    before = copy.deepcopy([state["momentum_buffer"] for state in optimizer.state.values()])
    mine = values(objective.student)
    objective.start_epoch([batch()], 6 / EPOCHS)
    average = values(objective.average)
    assert any(not torch.equal(mine[key], average[key]) for key in mine)
    for net in (objective.student, objective.nets.get_submodule("natural.net")):
        assert all(torch.equal(value, average[key]) for key, value in values(net).items())
    kept = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert all(map(torch.equal, before, kept))


def test_while_b_is_1_the_student_is_that_of_the_base_alone_to_the_bit_and_the_average_its_own():
    objective, alone = bound(), compose(parse("at"), student=tiny(0)).double().train()
    optimizer, average = sgd(alone), values(alone.student)
    go(objective, sgd(objective), range(6))
    x, y = batch()
    for t in range(6 * STEPS):
        optimizer.zero_grad()
        total(alone(x.double(), x.double().flip(2), y)).backward()
        optimizer.step()
        share = 1 - min(0.4, (1 + t) / (10 + t))
        average = {key: value.lerp(values(alone.student)[key], share) for key, value in average.items()}
    assert all(torch.equal(value, values(objective.student)[key]) for key, value in values(alone.student).items())
    torch.testing.assert_close(values(objective.average), average, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("stop", [5, 6, 7, 9, 10])
def test_a_loaded_state_goes_on_to_the_bit(stop: int):
    whole, first, resumed = bound(), bound(), bound()
    go(whole, sgd(whole), range(EPOCHS))
    optimizer, other = sgd(first), sgd(resumed)
    go(first, optimizer, range(stop))
    resumed.load_state_dict({**resumed.state_dict(), **copy.deepcopy(first.learned_state())})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(resumed, other, range(stop, EPOCHS))
    assert all(
        torch.equal(value, resumed.state_dict()[key])
        for key, value in whole.state_dict().items()
        if torch.is_tensor(value)
    )


def test_no_gradient_passes_between_the_learners_and_the_attack_sees_the_robust_one():
    objective, alone = bound(), compose(parse("at"), student=tiny(0)).double().train()
    x, y = batch()
    made = []
    for each in (objective, alone):
        each.start_epoch([(x, y)], 0.0)
        torch.manual_seed(0)
        made.append(each.perturb(x.double(), y, Linf(), steps=2))
    assert torch.equal(*made)
    terms = objective(x.double(), made[0], y)
    assert terms.keys() == {"adv", "natural"}
    terms["adv"].value.backward()
    assert all(p.grad is None for p in objective.nets["natural"].parameters())
    objective.zero_grad()
    terms["natural"].value.backward()
    assert all(p.grad is None for p in objective.student.parameters())


@pytest.mark.parametrize("average", ["none", "method"])
def test_the_average_is_what_is_validated_and_saved(average: Any):
    objective, epoch = bound(), Epoch(None, 0)  # type: ignore[arg-type]
    with Average(objective, Recipe(average=average), steps=4).applied(epoch) as student:
        assert student is objective.average


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("at+generalist(begin=0.7)", r"begin=0\.7 must be in \[0, 2/3\]: learners that have parted cannot be averaged"),
        ("at+generalist(share_end=2)", "share_end=2 must be in"),
        ("at+generalist(every=0)", "every=0 must be at least 1"),
        ("at+generalist(decay=1)", "decay=1 must be in"),
        ("natural+generalist", "its robust learner is the base's, and natural makes no adversarial examples"),
        ("at+ar-at+generalist", "'ar-at' rebuilds the student, and 'generalist' averages it with another network"),
        ("at+dajat+generalist", "'dajat' rebuilds the student, and 'generalist' averages it with another network"),
        ("at+adr+generalist", "adr and generalist each keep an average of the student; take one"),
        ("at+generalist+rebat", "generalist and rebat each keep an average of the student; take one"),
    ],
)
def test_what_makes_no_sense_is_refused(method: str, words: str):
    with pytest.raises(UserError, match=words):
        parse(method)


def test_learners_of_two_architectures_are_refused():
    with pytest.raises(UserError, match="averages the student with the natural model, so both must have one architect"):
        compose(parse("trades+generalist"), student=tiny(0), natural=nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))


def test_a_second_average_is_refused_before_any_work(tmp_path: Path):
    for average in ("ema", "swa"):
        with pytest.raises(UserError, match=f"its model is an average of its learners: average={average} must be none"):
            plan(parse("at+generalist"), load("digits"), "small-cnn", Recipe(average=average), runs=tmp_path, guests={})
    assert not list(tmp_path.iterdir())
