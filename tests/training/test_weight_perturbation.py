"""AWP against the authors' recipe done by hand: a copy, a step, the difference rescaled layer by layer."""

from __future__ import annotations

import copy

import torch
from tests.networks import tiny
from tests.objectives.short_training import bound
from tests.samples import batch

from advalign.objectives import compose, parse, total
from advalign.training.weight_perturbation import adversarial_weights


def test_is_the_rescaled_step_of_a_proxy_and_is_taken_off_again():
    x, y = batch()
    objective = bound("trades").double()
    x, x_adv = x.double(), (x + 0.02).clamp(0, 1).double()
    before = copy.deepcopy(objective.state_dict())

    proxy = copy.deepcopy(objective)
    ascent = torch.optim.SGD(proxy.parameters(), lr=0.01)
    (-total(proxy(x, x_adv, y))).backward()
    ascent.step()
    expected = {}
    for (name, old), new in zip(before.items(), proxy.state_dict().values(), strict=True):
        if old.ndim > 1 and "weight" in name:
            difference = new - old
            expected[name] = old + 0.01 * old.norm() / (difference.norm() + 1e-20) * difference

    with adversarial_weights(objective, 0.01, lambda: objective(x, x_adv, y)):
        inside = copy.deepcopy(objective.state_dict())
    for name, value in inside.items():
        torch.testing.assert_close(value, expected.get(name, before[name]), atol=1e-12, rtol=1e-10)
    assert len(expected) == 3
    for name, value in objective.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-14, rtol=1e-14)
        if "running" in name or "tracked" in name:
            assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in objective.parameters())


def test_climbs():
    x, y = batch()
    objective = bound("at").double()
    x = x.double()
    plain = total(objective(x, x, y)).item()
    with adversarial_weights(objective, 0.05, lambda: objective(x, x, y)):
        assert total(objective(x, x, y)).item() > plain


def test_a_weight_that_takes_no_part_stays():
    x, y = batch()
    net = tiny(0)
    net.auxiliary = torch.nn.Linear(3, 3)
    objective = compose(parse("at"), student=net)
    before = net.auxiliary.weight.clone()
    with adversarial_weights(objective, 0.05, lambda: objective(x, x, y)):
        assert torch.equal(net.auxiliary.weight, before)
