"""The least margin of probabilities in the ball, beside what can be computed otherwise."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.networks import Target
from torch import Tensor, nn

from advalign import attacks
from advalign.attacks import MinMargin
from advalign.attacks.losses import probability_margin
from advalign.threats import L2, Linf, Threat

THREAT = Linf(0.1)


class Linear(nn.Module):
    """Logits W x of two pixels."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.1)], ids=str)
def test_no_point_of_a_fine_grid_over_the_ball_has_a_lower_margin(threat: Threat):
    """Three classes, two pixels: everything that an attack could find can be tried."""
    torch.manual_seed(0)
    net = Linear(4 * torch.randn(3, 2)).eval()
    x = 0.2 + 0.6 * torch.rand(40, 1, 1, 2)
    y = net(x).argmax(1)
    found = -probability_margin(net(MinMargin(threat)(net, x, y)), y)
    steps = torch.linspace(-0.1, 0.1, 41)
    grid = torch.tensor(list(itertools.product(steps, steps))).view(-1, 1, 1, 1, 2)
    points = x + grid[grid.flatten(1).norm(dim=1) <= 0.1] if isinstance(threat, L2) else x + grid
    margins = torch.stack([-probability_margin(net(each), y) for each in points])
    least = margins.amin(0)
    assert 5 < (least > 0).sum() < 40
    assert torch.equal(found > 0, least > 0)
    withstood = least > 0
    assert (found <= least + 1e-4)[withstood].all()


@pytest.mark.slow
def test_it_finds_what_autoattack_finds_and_goes_on_where_an_image_withstands(target: Target):
    x, y = target.x[:80], target.y[:80]
    quick = MinMargin(THREAT, steps=20, targets=3)(target.model, x, y)
    margins = [-probability_margin(target.model(each), y) for each in (x, quick)]
    assert (margins[1] <= margins[0]).all()
    withstood = margins[1] > 0
    assert 20 < withstood.sum() < 80
    assert (margins[1] < margins[0])[withstood].all()  # not the clean image
    other = attacks.parse("worst(apgd-ce(steps=20), apgd-t(steps=20, targets=3))", threat=THREAT)
    broken = target.model(other(target.model, x, y)).argmax(1) != y
    assert (broken & withstood).sum() <= 1
