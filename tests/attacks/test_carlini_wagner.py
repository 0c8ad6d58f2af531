"""Carlini and Wagner's L2 attack against foolbox, and against closed forms on linear models."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.networks import Target, tiny
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import CarliniWagner
from advalign.threats import L2, Linf

ANYWHERE = Linf(8 / 255)  # which it does not keep to


def verdicts(model: nn.Module, x_adv: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Which images (N,) are misclassified, and how far (N,) they have moved."""
    with torch.no_grad():
        return model(x_adv).argmax(1) != y, (x_adv - x).flatten(1).norm(dim=1)


def foolboxed(model: nn.Module, x: Tensor, y: Tensor, **arguments: Any) -> Tensor:
    foolbox = pytest.importorskip("foolbox")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import foolbox.attacks

        attack = foolbox.attacks.L2CarliniWagnerAttack(abort_early=False, **arguments)
        return attack(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), x, y, epsilons=None)[0]


@pytest.mark.slow
def test_binary_search_finds_what_foolbox_finds(target: Target):
    model, x, y = target.model, target.x[:20], target.y[:20]
    theirs = foolboxed(model, x, y, binary_search_steps=5, steps=100, stepsize=0.05, initial_const=0.01)
    ours = CarliniWagner(ANYWHERE, c=0.01, steps=100, lr=0.05, search=5)(model, x, y)
    (found, length), (found_by_them, their_length) = (verdicts(model, x_adv, x, y) for x_adv in (ours, theirs))
    assert found.all()
    assert torch.equal(found, found_by_them)
    torch.testing.assert_close(length, their_length, atol=0, rtol=0.01)
    assert float(length.mean()) == pytest.approx(float(their_length.mean()), rel=1e-3)


class Linear(nn.Module):
    """Two logits, linear in the image: +-scale * (direction . x - offset), so that the boundary is a plane."""

    def __init__(self, direction: Tensor, scale: float) -> None:
        super().__init__()
        self.direction, self.scale = direction / direction.norm(), scale

    def height(self, x: Tensor) -> Tensor:
        """How far (N,) the images are from the boundary, on the side of class 0."""
        return (x - 0.5).flatten(1) @ self.direction

    def forward(self, x: Tensor) -> Tensor:
        z = self.scale * self.height(x)
        return torch.stack([z, -z], 1)


def linear_case(scale: float = 3.0, n: int = 12) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """The model, images far from the walls, their labels, and their distances, from 0.05 to 0.3."""
    generator = torch.Generator().manual_seed(5)
    direction = torch.randn(48, generator=generator, dtype=torch.double)
    model = Linear(direction, scale)
    x = 0.5 + 0.1 * (torch.rand(n, 3, 4, 4, generator=generator, dtype=torch.double) - 0.5)
    side = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).double()
    wanted = torch.linspace(0.05, 0.3, n).double()
    x += ((side * wanted - model.height(x))[:, None] * model.direction).view_as(x)
    return model, x, (side < 0).long(), wanted


@pytest.mark.slow
def test_binary_search_reaches_the_boundary_of_a_linear_model():
    model, x, y, distance = linear_case()
    x_adv = CarliniWagner(ANYWHERE, c=0.01, steps=200, lr=0.01, search=8)(model, x, y)
    found, length = verdicts(model, x_adv, x, y)
    assert found.all()
    assert (length >= distance - 1e-9).all()
    torch.testing.assert_close(length, distance, atol=1e-3, rtol=0.01)
    foot = x - (model.height(x)[:, None] * model.direction).view_as(x)
    assert (x_adv - foot).abs().max() < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("c", [0.01, 0.03, 0.1])
def test_a_fixed_c_crosses_where_it_is_at_least_two_squared_distances_by_the_margin(scale: float, c: float):
    """The margin is 2 scale d, so the law is d <= c scale: the logits' scale decides. Small steps do not overshoot."""
    model, x, y, distance = linear_case(scale)
    margin = 2 * scale * distance
    found, length = verdicts(model, CarliniWagner(ANYWHERE, c=c, steps=600, lr=0.001)(model, x, y), x, y)
    ratio = c / (2 * distance**2 / margin)
    assert found[ratio > 1.1].all()
    assert not found[ratio < 0.9].any()
    assert (length[~found] == 0).all()  # the clean image where there is none
    torch.testing.assert_close(length[ratio > 1.1], distance[ratio > 1.1], atol=2e-3, rtol=0.02)


@pytest.mark.slow
def test_successes_grow_with_c_and_with_the_scale_of_the_logits(target: Target):
    model, x, y = target.model, target.x[:60], target.y[:60]

    def broken(c: float, scale: float) -> Tensor:
        class Scaled(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return scale * model(x)

        net = Scaled()
        return verdicts(net, CarliniWagner(ANYWHERE, c=c, steps=100, lr=0.03)(net, x, y), x, y)[0]

    rates = [int(broken(c, 1.0).sum()) for c in (0.01, 0.1, 1.0, 10.0)]
    assert rates == sorted(rates)
    assert rates[0] < 6
    assert rates[-1] > 50
    assert torch.equal(broken(1.0, 0.1), broken(0.1, 1.0))


@pytest.mark.slow
def test_the_answer_is_the_nearest_of_the_iterates_that_fool():
    """The loop written out again with torch's own Adam."""
    x, _ = batch(16)
    model, x = tiny(0).double().eval(), x.double()
    with torch.no_grad():
        model.fc.bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    c, kappa, lr = 30.0, 0.002, 0.02
    w = (0.999999 * (2 * x - 1)).atanh().requires_grad_()
    optimizer = torch.optim.Adam([w], lr=lr)
    expected, shortest = x.clone(), [float("inf")] * 16
    for _ in range(60):
        x_adv = 0.5 * (w.tanh() + 1)
        logits = model(x_adv)
        cost = torch.zeros((), dtype=torch.double)
        for i in range(16):
            z, label = logits[i], int(y[i])
            squared = (x_adv[i] - x[i]).square().sum()
            gap = z[label] - z[[k for k in range(4) if k != label]].max()
            cost = cost + squared + c * torch.maximum(gap, torch.tensor(-kappa).double())
            if gap.item() <= -kappa and squared.item() < shortest[i]:
                expected[i], shortest[i] = x_adv[i].detach(), squared.item()
        optimizer.zero_grad()
        cost.backward(inputs=[w])
        optimizer.step()
    found = [length < float("inf") for length in shortest]
    assert any(found)
    assert not all(found)
    ours = CarliniWagner(ANYWHERE, c=c, kappa=kappa, steps=60, lr=lr)(model, x, y)
    torch.testing.assert_close(ours, expected, atol=1e-9, rtol=0)


@pytest.mark.slow
def test_kappa_asks_for_confidence(target: Target):
    model, x, y = target.model, target.x[:20], target.y[:20]
    lengths = []
    for kappa in (0.0, 1.0):
        x_adv = CarliniWagner(ANYWHERE, c=10.0, kappa=kappa, steps=100, lr=0.05)(model, x, y)
        found, length = verdicts(model, x_adv, x, y)
        assert found.all()
        with torch.no_grad():
            logits = model(x_adv)
        best = logits.topk(2).values
        assert (best[:, 0] - logits.gather(1, y[:, None]).squeeze(1) >= kappa - 1e-5).all()
        lengths.append(length)
    assert (lengths[1] > lengths[0]).all()


@pytest.mark.slow
def test_abort_saves_passes_and_costs_next_to_nothing(target: Target):
    """Measured on 60 images, 1000 steps of .01: half of the time at c = .1 and 1, the same successes, 0.3 % farther."""
    model, x, y = target.model, target.x[:40], target.y[:40]
    work, outcomes = [], []
    sizes: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for abort in (False, True):
        sizes.clear()
        x_adv = CarliniWagner(ANYWHERE, steps=300, lr=0.02, abort=abort)(model, x, y)
        work.append(sum(sizes))
        outcomes.append(verdicts(model, x_adv, x, y))
    handle.remove()
    assert work[0] == 300 * 40
    assert work[1] < 0.8 * work[0]
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    assert float(outcomes[1][1].mean()) == pytest.approx(float(outcomes[0][1].mean()), rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("abort", [False, True])
def test_the_threat_does_not_matter(target: Target, abort: bool):
    model, x, y = target.model, target.x[:8], target.y[:8]
    near, far = (CarliniWagner(t, steps=60, lr=0.05, abort=abort)(model, x, y) for t in (Linf(1e-3), L2(9.0)))
    assert torch.equal(near, far)
    assert (near - x).abs().max() > 0.05
    assert not CarliniWagner(ANYWHERE).bounded


@pytest.mark.slow
def test_pixels_at_the_walls_can_leave_them():
    x = torch.zeros(2, 1, 4, 4)
    x[1] = 1
    x[:, :, 0] = 0.5
    model = Linear(torch.ones(16), 5.0)
    y = torch.tensor([1, 0])
    x_adv = CarliniWagner(ANYWHERE, c=10.0, steps=600, lr=0.02)(model, x, y)
    found, _ = verdicts(model, x_adv, x, y)
    assert found.all()
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert ((x_adv - x)[:, :, 1:].abs() > 0.01).any()


@pytest.mark.parametrize("classes", [2, *(pytest.param(many, marks=pytest.mark.slow) for many in (3, 4, 8))])
def test_any_number_of_classes(classes: int):
    x, _ = batch(16)
    model = tiny(0, classes=classes).eval()
    with torch.no_grad():
        model.fc.bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    x_adv = CarliniWagner(ANYWHERE, steps=50, lr=0.05, search=4)(model, x, y)
    assert verdicts(model, x_adv, x, y)[0].all()


def test_images_that_are_wrong_already_stay_where_they_are():
    x, _ = batch(8)
    model = tiny(0).eval()
    with torch.no_grad():
        y = (model(x).argmax(1) + 1) % 4
    torch.testing.assert_close(CarliniWagner(ANYWHERE, steps=20)(model, x, y), x, atol=2e-6, rtol=0)
