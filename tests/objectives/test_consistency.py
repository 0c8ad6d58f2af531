"""Consistency: both augmentations attacked, the base's loss over both, and the divergence of the pairs, in numpy.

Run beside the authors' code (adv_train_consistency.py, adv_trades_consistency.py) on the same tensors in float64:
losses and gradients agree to 1e-15, and the examples to the bit.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.objectives.formulas import Case, ce, kl, softmax
from torch import Tensor

from advalign.errors import UserError
from advalign.objectives import Objective, compose, parse, total
from advalign.objectives.distances import jensen_shannon
from advalign.threats import Linf


def js(a: np.ndarray, b: np.ndarray) -> float:
    m = (a + b) / 2
    return sum(0.5 * p[k] * (math.log(p[k]) - math.log(m[k])) for p in (a, b) for k in range(len(m)))


def bound(method: str, case: Case) -> Objective:
    return compose(parse(method), student=copy.deepcopy(case.student)).double().train()


@pytest.mark.parametrize(("spelled", "weight", "t"), [("", 1.0, 0.5), ("(weight=3, temperature=2)", 3.0, 2.0)])
@pytest.mark.parametrize("base", ["at", "trades"])
def test_the_bases_loss_over_both_and_the_divergence_of_the_pairs(base: str, spelled: str, weight: float, t: float):
    case = Case()
    both, both_adv = torch.cat([case.x, case.x.flip(3)]), torch.cat([case.x_adv, case.x_adv.flip(3) ** 2])
    z, q, n = case.logits(both), case.logits(both_adv), len(case.x)
    labels = case.labels + case.labels
    expected = {
        "at": np.mean([ce(q[i], y) for i, y in enumerate(labels)]),
        "trades": np.mean([ce(z[i], y) + 6 * kl(z[i], q[i]) for i, y in enumerate(labels)]),
    }[base] + weight * np.mean([js(softmax(q[i] / t), softmax(q[i + n] / t)) for i in range(n)])
    found = bound(f"{base}+consistency{spelled}", case)(case.x, both_adv, case.y, case.x.flip(3))
    assert total(found).item() == pytest.approx(expected, rel=1e-9)


def test_each_augmentation_is_attacked_around_itself():
    case = Case()
    objective, second = bound("trades+consistency", case), case.x.flip(3)
    torch.manual_seed(0)
    x_adv = objective.perturb(case.x, case.y, Linf(8 / 255), second=second, steps=3)
    both = torch.cat([case.x, second])
    assert x_adv.shape == both.shape
    assert (x_adv - both).abs().max() <= 8 / 255 + 1e-12
    alone = bound("trades", case)
    torch.manual_seed(0)
    expected = alone.perturb(both, torch.cat([case.y, case.y]), Linf(8 / 255), steps=3)
    torch.testing.assert_close(x_adv, expected, rtol=0, atol=1e-12)


def test_the_divergence_is_symmetric_bounded_and_zero_for_equals():
    p, q = ((3 * torch.randn(50, 7, dtype=torch.double)).log_softmax(1) for _ in range(2))
    assert float(jensen_shannon(p, p)) == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(jensen_shannon(p, q), jensen_shannon(q, p))
    sure = (1e3 * torch.eye(7, dtype=torch.double)).log_softmax(1)
    assert float(jensen_shannon(sure, sure.roll(1, 0))) == pytest.approx(math.log(2), rel=1e-6)
    logits = [torch.randn(5, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]

    def divergence(a: Tensor, b: Tensor) -> Tensor:
        return jensen_shannon(a.log_softmax(1), b.log_softmax(1))

    assert torch.autograd.gradcheck(divergence, logits)  # gradient flows through both sides


def test_what_is_missing_or_out_of_range_is_refused():
    case = Case()
    with pytest.raises(UserError, match="attacks a second augmentation of the batch: give second="):
        bound("at+consistency", case)(case.x, case.x_adv, case.y)
    for method in ("at+consistency", "trades+afa"):
        with pytest.raises(UserError, match=r"images lie in .* but attacks need \[0, 1\]"):
            bound(method, case).perturb(case.x, case.y, Linf(), second=255 * case.x)
    with pytest.raises(UserError, match="temperature=0 must be above 0"):
        parse("at+consistency(temperature=0)")
    assert compose(parse("at+consistency"), student=tiny(0)).method.further == 1
