"""Attacks against foolbox, against published loops written out again, and against closed forms on linear models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.networks import tiny
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import FGSM, MIM, PGD
from advalign.attacks.losses import kl_divergence, margin
from advalign.threats import L2, Linf, Threat

EPS = 8 / 255
X, Y = batch(12)
X = X.double()


def net() -> nn.Module:
    """A net with every class near."""
    net = tiny(0).double().eval()
    with torch.no_grad():
        net.fc.bias.sub_(net(X).mean(0))
    return net


def foolboxed(attack: Any, eps: float) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = foolbox.PyTorchModel(net(), bounds=(0, 1), device="cpu")
        return attack(model, X, Y, epsilons=eps)[0]


def foolbox_attacks() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("foolbox")
        import foolbox.attacks

        return foolbox.attacks


@pytest.mark.parametrize("eps", [EPS, 0.3])
def test_linf_equals_foolbox(eps: float):
    fa = foolbox_attacks()
    theirs = foolboxed(fa.LinfFastGradientAttack(), eps)
    torch.testing.assert_close(FGSM(Linf(eps))(net(), X, Y), theirs, atol=1e-6, rtol=0)
    theirs = foolboxed(fa.LinfPGD(abs_stepsize=eps / 3, steps=9, random_start=False), eps)
    ours = PGD(Linf(eps), steps=9, step_size=eps / 3, start="clean", until_fooled=False)(net(), X, Y)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("eps", [0.5, 3.0])
def test_l2_equals_foolbox(eps: float):
    fa = foolbox_attacks()
    theirs = foolboxed(fa.L2FastGradientAttack(), eps)
    torch.testing.assert_close(FGSM(L2(eps))(net(), X, Y), theirs, atol=1e-6, rtol=0)
    theirs = foolboxed(fa.L2PGD(rel_stepsize=0.4, steps=9, random_start=False), eps)
    ours = PGD(L2(eps), steps=9, step_size=0.4 * eps, start="clean", until_fooled=False)(net(), X, Y)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def mi_fgsm(model: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int, decay: float) -> list[Tensor]:
    """Dong et al. 2018, algorithm 1, image by image; all iterates."""
    iterates = [x.clone()]
    velocity = torch.zeros_like(x)
    for _ in range(steps):
        point = iterates[-1].clone().requires_grad_()
        F.cross_entropy(model(point), y, reduction="sum").backward()
        assert point.grad is not None
        for i in range(len(x)):
            velocity[i] = decay * velocity[i] + point.grad[i] / point.grad[i].abs().mean()
        moved = point.detach() + eps / 4 * velocity.sign()
        iterates.append(torch.minimum(torch.maximum(moved, x - eps), x + eps).clamp(0, 1))
    return iterates


def first_fooling(model: nn.Module, iterates: list[Tensor], y: Tensor) -> tuple[Tensor, list[int]]:
    """For each image its first misclassified iterate, or the last one; and which it was."""
    with torch.no_grad():
        fooled = torch.stack([model(iterate).argmax(1) != y for iterate in iterates])
    chosen = [next((k for k in range(len(iterates)) if fooled[k, i]), len(iterates) - 1) for i in range(len(y))]
    return torch.stack([iterates[k][i] for i, k in enumerate(chosen)]), chosen


@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_mim_is_the_loop_of_the_paper(decay: float):
    model = net()
    y = model(X).argmax(1)
    eps = 0.02
    expected, chosen = first_fooling(model, mi_fgsm(model, X, y, eps, 5, decay), y)
    assert 5 in chosen
    assert set(chosen) & {1, 2, 3, 4}  # some stop on the way
    torch.testing.assert_close(MIM(Linf(eps), steps=5, decay=decay)(net(), X, y), expected, atol=1e-12, rtol=0)


def test_momentum_leads_elsewhere_than_its_absence():
    model = net()
    y = model(X).argmax(1)
    plain, heavy = (MIM(Linf(EPS), steps=5, decay=decay)(net(), X, y) for decay in (0.0, 1.0))
    without = PGD(Linf(EPS), steps=5, start="clean")(net(), X, y)
    torch.testing.assert_close(plain, without, atol=1e-12, rtol=0)
    assert not torch.allclose(heavy, plain)


class Linear(nn.Module):
    """Logits linear in the image, so that the strongest perturbation is known."""

    def __init__(self, weight: Tensor, bias: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.tensor(bias, dtype=weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def linear_case() -> tuple[Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(2, 12, generator=generator, dtype=torch.double) / 4
    x = torch.rand(6, 3, 2, 2, generator=generator, dtype=torch.double)
    x[0] = x[0].round()  # some pixels at the walls of the box
    y = torch.tensor([0, 1, 0, 1, 0, 1])
    upwards = (weight[1] - weight[0]).view(1, 3, 2, 2) * (1 - 2 * y).view(-1, 1, 1, 1)
    return Linear(weight, [0.0, 0.0]), x, y, upwards


LINEAR_LINF = [
    FGSM(Linf(0.1)),
    PGD(Linf(0.1), steps=4, start="clean", until_fooled=False),
    PGD(Linf(0.1), steps=8, until_fooled=False),  # from anywhere in the ball: 8 steps of eps / 4 cross it
    PGD(Linf(0.1), steps=20, start="gaussian", until_fooled=False),
    PGD(Linf(0.1), steps=4, loss="margin", start="clean", until_fooled=False),
]


@pytest.mark.parametrize("attack", LINEAR_LINF, ids=str)
def test_linf_on_a_linear_model_reaches_the_corner(attack: FGSM | PGD):
    model, x, y, upwards = linear_case()
    expected = (x + 0.1 * upwards.sign()).clamp(0, 1)
    torch.testing.assert_close(attack(model, x, y), expected, atol=1e-9, rtol=0)


def test_l2_on_a_linear_model_reaches_the_end_of_the_gradient():
    model, x, y, upwards = linear_case()
    x = 0.4 + 0.2 * x  # far from the walls
    expected = x + 0.3 * upwards / upwards.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    for attack in (FGSM(L2(0.3)), PGD(L2(0.3), steps=4, start="clean", until_fooled=False)):
        torch.testing.assert_close(attack(model, x, y), expected, atol=1e-6, rtol=0)


def test_margin_follows_the_best_rival_alone():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 12, generator=generator, dtype=torch.double) / 4
    x = torch.rand(5, 3, 2, 2, generator=generator, dtype=torch.double)
    model = Linear(weight, [9.0, 0.0, -9.0])  # classes 0, 1, 2 in this order wherever the attack goes
    attack = PGD(Linf(0.1), steps=4, loss="margin", start="clean")
    for label, rival in [(0, 1), (1, 0), (2, 0)]:
        climbed = PGD(Linf(0.1), steps=4, loss="margin", start="clean", until_fooled=False)
        expected = (x + 0.1 * (weight[rival] - weight[label]).sign().view(1, 3, 2, 2)).clamp(0, 1)
        torch.testing.assert_close(climbed(model, x, torch.full((5,), label)), expected, atol=1e-9, rtol=0)
    assert torch.equal(attack(model, x, torch.full((5,), 1)), x)  # already wrong: kept as it is


def test_kl_climbs_away_from_the_clean_prediction_whatever_the_label():
    model, x, y, _ = linear_case()
    difference = (model.weight[1] - model.weight[0]).detach().view(1, 3, 2, 2)
    torch.manual_seed(8)
    side = ((x + torch.empty_like(x).uniform_(-0.1, 0.1)).clamp(0, 1) - x).mul(difference).flatten(1).sum(1).sign()
    assert side.unique().numel() == 2
    expected = (x + 0.1 * side.view(-1, 1, 1, 1) * difference.sign()).clamp(0, 1)
    attack = PGD(Linf(0.1), steps=8, loss="kl", until_fooled=False)
    for labels in (y, 1 - y):
        torch.manual_seed(8)
        torch.testing.assert_close(attack(model, x, labels), expected, atol=1e-9, rtol=0)


def test_margin_and_kl_by_hand():
    logits = torch.tensor([[2.0, 5.0, 1.0], [2.0, 5.0, 1.0], [4.0, -1.0, 4.0]])
    assert margin(logits, torch.tensor([1, 0, 2])).tolist() == [-3.0, 3.0, 0.0]
    third, half = torch.tensor([[1 / 3, 2 / 3]]).log() + 7, torch.tensor([[0.5, 0.5]]).log() - 2
    towards_half = 0.5 * torch.tensor(9 / 8).log()  # sum of 1/2 log((1/2) / p)
    assert kl_divergence(third, half).item() == pytest.approx(towards_half.item(), rel=1e-5)
    towards_third = torch.tensor(2 / 3).log() / 3 + 2 * torch.tensor(4 / 3).log() / 3
    assert kl_divergence(half, third).item() == pytest.approx(towards_third.item(), rel=1e-5)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.3)])
def test_a_sure_model_is_climbed_all_the_same(threat: Threat):
    """At a gap of 60 the gradient is about 1e-26, whose square fp32 cannot hold."""
    weight = torch.stack([torch.zeros(12), torch.linspace(-1, 1, 12)])
    x, y = torch.full((2, 3, 2, 2), 0.5), torch.zeros(2, dtype=torch.int64)
    direction = weight[1].sign() if isinstance(threat, Linf) else weight[1] / weight[1].norm()
    expected = x + threat.eps * direction.view(1, 3, 2, 2)
    attack = PGD(threat, steps=8, start="clean", until_fooled=False)
    # In one step of 1/8 of the radius: many steps that are too long would also end at the radius.
    torch.testing.assert_close(attack(Linear(weight, [60.0, 0.0]), x, y), expected, atol=1e-5, rtol=0)
    short = PGD(threat, steps=1, step_size=threat.eps / 8, start="clean", until_fooled=False)
    moved = short(Linear(weight, [60.0, 0.0]), x, y)
    torch.testing.assert_close(moved - x, (expected - x) / 8, atol=1e-6, rtol=0)
