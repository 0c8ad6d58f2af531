"""Parts that block gradients: what is passed by, what stays, and the attack that works again."""

from __future__ import annotations

import pytest
import torch
from tests.networks import fooled, own_labels, sharp
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import PGD
from advalign.errors import UserError
from advalign.evaluation.accuracy import evaluate
from advalign.models import bpda
from advalign.threats import Linf

THREAT = Linf(0.1)


class Quantised(nn.Module):
    """Sixteen levels, which has the derivative 0."""

    def forward(self, x: Tensor) -> Tensor:
        return (16 * x).round() / 16


@pytest.mark.parametrize("backward", [None, lambda x: x**2], ids=["identity", "square"])
def test_the_value_is_the_parts_and_the_gradient_the_stand_ins(backward):
    x = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    part = bpda(Quantised(), backward)
    assert torch.equal(part(x), Quantised()(x))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (grad,) = torch.autograd.grad((weight * part(x)).sum(), x)
    torch.testing.assert_close(grad, weight if backward is None else 2 * weight * x.detach())


def test_an_attack_regains_the_success_that_quantisation_took():
    x, _ = batch(64)
    net = sharp()
    masked, passed = nn.Sequential(Quantised(), net).eval(), nn.Sequential(bpda(Quantised()), net).eval()
    y = own_labels(masked, x)
    attack = PGD(THREAT, steps=10, start="clean")
    assert not fooled(masked, attack(masked, x, y), y).any()
    broken = fooled(masked, attack(passed, x, y), y)
    assert broken.sum() >= 0.9 * fooled(net, attack(net, x, own_labels(net, x)), own_labels(net, x)).sum() > 10
    found = evaluate(passed, (x, y), attack)
    assert torch.equal(found.correct[str(attack)], ~broken)
    assert any("gradient" in line for line in evaluate(masked, (x, y), attack).warnings)
    assert not any("gradient" in line for line in found.warnings)


def test_a_stand_in_of_another_shape_is_refused():
    with pytest.raises(UserError, match=r"bpda: the part maps \(2, 4\) to \(2, 2\) and its stand-in to \(2, 4\)"):
        bpda(lambda x: x[:, :2])(torch.zeros(2, 4))
