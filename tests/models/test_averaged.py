"""A network that draws at random: its mean prediction, the gradient of that, and attacks that noise alone stops."""

from __future__ import annotations

import pytest
import torch
from tests.networks import fooled, own_labels, sharp
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import PGD
from advalign.errors import UserError
from advalign.models import Averaged
from advalign.threats import Linf


class Noisy(nn.Module):
    """A network whose images are moved by noise before it sees them."""

    def __init__(self, net: nn.Module, size: float) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.size * torch.randn_like(x))


def test_the_mean_prediction_and_its_gradient():
    x, noisy = batch(6)[0].requires_grad_(), Noisy(sharp(), 0.3)
    torch.manual_seed(0)
    expected = torch.stack([noisy(x).softmax(1) for _ in range(7)]).mean(0)
    torch.manual_seed(0)
    found = Averaged(noisy, draws=7)(x)
    torch.testing.assert_close(found.exp(), expected)
    grads = [torch.autograd.grad(each[:, 1].log().sum(), x)[0] for each in (expected, found.exp())]
    torch.testing.assert_close(grads[1], grads[0])


def test_without_noise_it_is_the_network():
    x, net = batch(6)[0], sharp()
    torch.testing.assert_close(Averaged(net, draws=3)(x), net(x).log_softmax(1))


def test_the_expectation_breaks_what_the_gradient_of_one_draw_does_not():
    x, noisy = batch(64)[0], Noisy(sharp(), 0.5)
    steady = Averaged(noisy, draws=40)
    torch.manual_seed(0)
    y, attack = own_labels(steady, x), PGD(Linf(0.03), steps=10, start="clean", until_fooled=False)
    judge, broken = Averaged(noisy, draws=100), []
    for model in (noisy, Averaged(noisy, draws=20)):
        broken.append(int(fooled(judge, attack(model, x, y), y).sum()))
    assert broken[1] > broken[0] > 0


def test_no_draws_are_refused():
    with pytest.raises(UserError, match="draws=0 must be at least 1"):
        Averaged(sharp(), draws=0)
