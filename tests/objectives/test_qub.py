"""QUB: the bound itself, image by image in numpy, and what makes it one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.objectives.formulas import Case, ce, softmax

from advalign.errors import UserError
from advalign.models import Output
from advalign.objectives import Objective, compose, parse, total
from advalign.objectives.contract import ADV, CLEAN
from advalign.objectives.plugins.qub import QUB


def bound(z: np.ndarray, q: np.ndarray, y: int) -> float:
    slope = softmax(z) - np.eye(len(z))[y]
    return ce(z, y) + sum((q - z) * slope) + 0.25 * sum((q - z) ** 2)


def objective(method: str, case: Case) -> Objective:
    return compose(parse(method), student=copy.deepcopy(case.student)).double().train()


def test_at_becomes_the_papers_loss_and_the_mixed_form_goes_back_to_the_cross_entropy():
    case = Case()
    assert case.loss("at+qub") == pytest.approx(case.mean(bound), rel=1e-9)
    mixed = objective("at+qub(decreasing=true)", case)
    mixed.start_epoch([], 0.0)
    for t in (0.0, 0.25, 0.9):
        mixed.start_step(t)
        expected = case.mean(lambda z, q, y, t=t: (1 - t) * bound(z, q, y) + t * ce(q, y))
        assert total(mixed(case.x, case.x_adv, case.y)).item() == pytest.approx(expected, rel=1e-9)


def test_it_is_an_upper_bound_for_all_logits():
    draw = torch.Generator().manual_seed(0)
    for scale in (0.1, 3.0, 40.0):
        z, q = (scale * torch.randn(3000, 10, generator=draw, dtype=torch.double) for _ in range(2))
        near = z + 0.01 * q
        for other in (q, near):
            rows = [QUB().terms(_outs(z[i : i + 1], other[i : i + 1]), torch.tensor([0]))["qub"] for i in range(50)]
            assert min(row.value.item() for row in rows) >= -1e-12
            gap = 0.25 * (other - z).square().sum(1) - F.kl_div(
                other.log_softmax(1), z.log_softmax(1), log_target=True, reduction="none"
            ).sum(1)
            assert gap.min() >= -1e-12


def _outs(z: torch.Tensor, q: torch.Tensor):
    return {CLEAN: Output(z, {}), ADV: Output(q, {})}


def test_at_the_clean_image_it_is_the_cross_entropy_and_so_is_its_gradient():
    z = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    q = z.detach().clone().requires_grad_()
    value = QUB().terms(_outs(z, q), torch.zeros(6, dtype=torch.long))["qub"].value
    grads = torch.autograd.grad(value, (z, q))
    assert value.abs() < 1e-15
    assert all(grad.abs().max() < 1e-15 for grad in grads)


def test_no_detach_in_the_gap():
    z, q = (torch.randn(5, 4, dtype=torch.double, requires_grad=True) for _ in range(2))
    y = torch.zeros(5, dtype=torch.long)
    assert torch.autograd.gradcheck(lambda a, b: QUB().terms(_outs(a, b), y)["qub"].value, (z, q))


def test_only_a_weight_that_falls_waits_for_the_epochs():
    case = Case()
    objective("at+qub", case)(case.x, case.x_adv, case.y)
    with pytest.raises(UserError, match="'qub' follows the epochs"):
        objective("at+qub(decreasing=true)", case)(case.x, case.x_adv, case.y)


@pytest.mark.parametrize("base", ["trades", "rslad", "score(form=at)"])
def test_bases_without_a_cross_entropy_of_adversarial_images_are_refused(base: str):
    with pytest.raises(UserError, match=r"it bounds the cross entropy of adversarial images, and .* has none"):
        parse(f"{base}+qub")
