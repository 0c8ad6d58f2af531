"""Auto-PGD on plain margins beside what can be computed otherwise, its diverse start, and the estimate made of both."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.networks import Target
from torch import nn

from advalign.attacks import APGDMargin, AutoAttack, Fast
from advalign.attacks.apgd_margin import odi_start
from advalign.evaluation.accuracy import evaluate
from advalign.threats import L2, Linf, Threat


def linear(classes: int = 3) -> nn.Module:
    """Logits W x of two pixels."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, classes, bias=False))
    net[1].weight.data = 4 * torch.randn(classes, 2)
    return net.eval()


@pytest.mark.parametrize("start", ["uniform", "odi"])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.1)], ids=str)
def test_it_breaks_what_some_point_of_a_fine_grid_over_the_ball_breaks(threat: Threat, start):
    """Three classes, two pixels: everything that an attack could find can be tried."""
    torch.manual_seed(0)
    net, x = linear(), 0.2 + 0.6 * torch.rand(60, 1, 1, 2)
    y = net(x).argmax(1)
    broken = net(APGDMargin(threat, start=start)(net, x, y)).argmax(1) != y
    steps = torch.linspace(-0.1, 0.1, 41)
    grid = torch.tensor(list(itertools.product(steps, steps))).view(-1, 1, 1, 1, 2)
    grid = grid[grid.flatten(1).norm(dim=1) <= 0.1] if isinstance(threat, L2) else grid
    on_grid = torch.stack([net(point).argmax(1) != y for point in x + grid]).any(0)
    assert 5 < on_grid.sum() < 55
    assert torch.equal(broken, on_grid)


def test_a_diverse_start_goes_where_a_random_sum_of_logits_grows_fastest():
    """On a linear network in Linf two steps of the whole radius end in the corner that the sum's gradient points to."""
    torch.manual_seed(1)
    net, x = linear(), torch.full((50, 1, 1, 2), 0.5)
    torch.manual_seed(2)
    weights = torch.empty(50, 3).uniform_(-1, 1)
    torch.manual_seed(2)
    started = odi_start(net, x, Linf(0.1))
    expected = 0.5 + 0.1 * (weights @ net[1].weight).sign()  # pyright: ignore[reportIndexIssue, reportOperatorIssue]
    assert torch.allclose(started.flatten(1), expected.detach(), atol=1e-6)
    assert len(started.flatten(1).round(decimals=4).unique(dim=0)) > 2


def test_the_estimate_has_its_published_parts():
    names = [str(member) for member in Fast(Linf()).members]
    assert names == ["apgd-ce(steps=100)", "apgd-margin(steps=40)", 'apgd-margin(steps=40, start="odi")']


@pytest.mark.slow
def test_the_estimate_agrees_with_autoattack_in_a_fraction_of_the_passes(target: Target):
    threat, data = Linf(0.1), (target.x[:60], target.y[:60])
    found = evaluate(target.model, data, [AutoAttack(threat), Fast(threat)])
    robust = {name: int(found.correct[name].sum()) for name in ("autoattack", "fast")}
    assert 10 < robust["autoattack"] < 55
    assert abs(robust["fast"] - robust["autoattack"]) <= 1
    assert sum(found.passes["autoattack"]) > 4 * sum(found.passes["fast"])
