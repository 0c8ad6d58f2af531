"""SCORE: squared errors of probabilities, image by image in numpy.

The loss and the attack were run beside the authors' code (without_DDPM/train_cifar.py, gowal21uncovering/utils/
trades.py) on the same tensors in float64: losses agree to 1e-16, gradients to 1e-17.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.objectives.formulas import Case, softmax

from advalign.errors import UserError
from advalign.models import Output
from advalign.objectives import compose, parse, total
from advalign.objectives.bases.score import SCORE, squared_distance, squared_error
from advalign.objectives.contract import ADV, CLEAN
from advalign.threats import Linf


def d(a: np.ndarray, b: np.ndarray) -> float:
    return sum((a[k] - b[k]) ** 2 for k in range(len(a)))


def onehot(y: int) -> np.ndarray:
    return np.eye(4)[y]


def test_the_loss_is_clipped_as_a_whole():
    case = Case()
    for spelled, beta, c in (("score", 6, 0.3), ("score(beta=4, clip=0)", 4, 0.0), ("score(clip=0.7)", 6, 0.7)):
        c0 = c**2 * (1 + 1 / 3)
        expected = case.mean(
            lambda z, q, y, c0=c0, beta=beta: max(0.0, d(softmax(z), onehot(y)) + beta * d(softmax(q), softmax(z)) - c0)
        )
        assert case.loss(spelled) == pytest.approx(expected, rel=1e-9)
    for spelled, c in (("score(form=at)", 0.4), ("score(form=at, clip=0)", 0.0), ("score(form=at, clip=0.75)", 0.75)):
        c0 = c**2 * (1 + 1 / 3)
        expected = case.mean(lambda z, q, y, c0=c0: max(0.0, d(softmax(q), onehot(y)) - c0))
        assert case.loss(spelled) == pytest.approx(expected, rel=1e-9)


def test_an_image_below_the_bound_has_no_gradient_and_the_others_their_whole():
    z, q = (torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]], dtype=torch.double, requires_grad=True) for _ in range(2))
    y = torch.tensor([0, 0])

    def slopes(part: SCORE) -> tuple[torch.Tensor, ...]:
        loss = total(part.terms({CLEAN: Output(z, {}), ADV: Output(q * 1.5, {})}, y))
        return torch.autograd.grad(loss, (z, q))

    for clipped, whole in zip(slopes(SCORE()), slopes(SCORE(clip=0)), strict=True):
        assert (clipped[0] == 0).all()
        assert (whole[0] != 0).any()
        assert torch.equal(clipped[1], whole[1])
        assert (whole[1] != 0).any()


def test_distances_lie_between_zero_and_two_and_carry_gradient_on_both_sides():
    z, q = (50 * torch.randn(200, 4, dtype=torch.double) for _ in range(2))
    found = squared_distance(z, q)
    assert found.min() >= 0
    assert found.max() <= 2
    y = torch.randint(4, (200,))
    torch.testing.assert_close(squared_error(z, y), squared_distance(z, 1e4 * torch.nn.functional.one_hot(y).double()))
    small = (torch.randn(3, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: squared_distance(a, b).sum(), tuple(small))


@pytest.mark.parametrize("form", ["trades", "at"])
def test_the_attack_climbs_the_distance_of_the_loss(form: str):
    case, eps = Case(), 8 / 255
    objective = compose(parse(f"score(form={form})"), student=copy.deepcopy(case.student)).double().train()
    torch.manual_seed(3)
    x_adv = objective.perturb(case.x, case.y, Linf(eps), steps=4)
    net, x = copy.deepcopy(case.student).train(form == "at"), case.x
    torch.manual_seed(3)
    noise = torch.empty_like(x).uniform_(-eps, eps) if form == "at" else 0.001 * torch.randn_like(x)
    plain = (x + noise).clamp(0, 1) if form == "at" else x + noise
    target = net(x).softmax(1).detach() if form == "trades" else torch.eye(4, dtype=torch.double)[case.y]
    for _ in range(4):
        plain = plain.detach().requires_grad_()
        (grad,) = torch.autograd.grad(((net(plain).softmax(1) - target) ** 2).sum(), plain)
        plain = (x + (plain.detach() + eps / 4 * grad.sign() - x).clamp(-eps, eps)).clamp(0, 1)
    torch.testing.assert_close(x_adv, plain, atol=1e-9, rtol=0)


def test_refusals_of_score():
    with pytest.raises(UserError, match=r"score: clip=1.0 must be in \[0, 1\)"):
        parse("score(clip=1)")
    with pytest.raises(UserError, match=r"'score' has no cross entropy: label_smoothing=0\.1 must be 0"):
        compose(parse("score"), student=tiny(0), label_smoothing=0.1)
