"""Terms on views made of an image and its adversarial example: RPAT and IGDM, in numpy, image by image.

RPAT's term was compared with the authors' (RPAT_Benchmarks, adv_lib/mart.py and training/adv_train), IGDM's with
theirs (igdm.py), on the same tensors in float64: losses and gradients agree to 1e-15.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.objectives.formulas import Case, kl
from torch import Tensor, nn

from advalign.errors import UserError
from advalign.objectives import Objective, compose, parse, total
from advalign.objectives.contract import ADV, CLEAN


class Flat(nn.Module):
    """An affine map of the pixels."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc = nn.Linear(192, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def bound(method: str, student: nn.Module, robust: nn.Module | None = None) -> Objective:
    objective = compose(parse(method), student=copy.deepcopy(student), robust=copy.deepcopy(robust)).double().train()
    objective.start_epoch([], 0.0)
    return objective


@pytest.mark.parametrize("base", ["at", "trades", "mart", "hat"])
def test_rpat_compares_the_logits_between_with_what_lies_between_the_logits(base: str):
    case = Case()
    z, q = case.logits(case.x), case.logits(case.x_adv)
    for spelled, weight, r in (("rpat", 1.0, 0.5), ("rpat(weight=3, rate=0.8)", 3.0, 0.8)):
        between = case.logits(r * case.x + (1 - r) * case.x_adv)
        gaps = [(between[i, k] - r * z[i, k] - (1 - r) * q[i, k]) ** 2 for i in range(len(z)) for k in range(4)]
        expected = case.loss(base) + weight * np.mean(gaps)
        assert case.loss(f"{base}+{spelled}") == pytest.approx(expected, rel=1e-9)


def test_rpat_is_zero_for_affine_maps_and_its_gradient_reaches_all_three_passes():
    case = Case()
    terms = bound("at+rpat(rate=0.3)", Flat(0))(case.x, case.x_adv, case.y)
    assert terms["rpat"].value.item() < 1e-30
    objective = bound("trades+rpat", case.student)
    outs = objective._passes(case.x, case.x_adv, None)
    value = objective.method.plugins[0].terms(outs, case.y)["rpat"].value
    between = next(need for need in outs if need.view == "between")
    grads = torch.autograd.grad(value, [outs[need].logits for need in (CLEAN, ADV, between)])
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("base", ["rslad", "trades", "adaad"])
def test_igdm_compares_differences_across_the_clean_image(base: str):
    case = Case()
    minus = 2 * case.x - case.x_adv
    assert minus.min() < 0 or minus.max() > 1  # not clamped
    student = case.logits(case.x_adv) - case.logits(minus)
    teacher = (case.robust(case.x_adv) - case.robust(minus)).detach().numpy()
    gap = np.mean([kl(teacher[i], student[i]) for i in range(len(student))])
    plain, joined = (bound(method, case.student, case.robust) for method in (base, f"{base}+igdm(weight=5)"))
    rest = total(plain(case.x, case.x_adv, case.y)).item()
    for t in (0.0, 0.3, 0.9):
        joined.start_step(t)
        found = total(joined(case.x, case.x_adv, case.y))
        assert found.item() == pytest.approx(rest + 5 * t * gap, rel=1e-9)
    found.backward()
    assert all(p.grad is None for p in joined.nets["robust"].parameters())


def test_the_differences_of_affine_maps_are_twice_their_slope():
    case, student, teacher = Case(), Flat(1), Flat(2)
    objective = bound("adaad+igdm", student, teacher)
    objective.start_step(0.5)
    delta = (case.x_adv - case.x).flatten(1)
    slopes = [2 * (delta @ net.fc.weight.double().T).detach().numpy() for net in (student, teacher)]
    expected = np.mean([kl(t, s) for s, t in zip(*slopes, strict=True)])
    assert objective(case.x, case.x_adv, case.y)["igdm"].value.item() == pytest.approx(expected, rel=1e-9)


def test_igdm_is_zero_and_flat_if_the_student_is_the_teacher():
    case = Case()
    objective = compose(parse("adaad+igdm"), student=tiny(0), robust=tiny(0)).double().eval()
    value = objective(case.x, case.x_adv, case.y)["igdm"].value
    grads = torch.autograd.grad(value, list(objective.student.parameters()), allow_unused=True)
    assert value.abs() < 1e-12
    assert all(grad is None or grad.abs().max() < 1e-9 for grad in grads)


def test_refusals():
    for wrong, words in (
        ("at+rpat(rate=1)", "rate=1 must be between 0 and 1"),
        ("at+rpat(weight=-1)", "weight=-1 must be at least 0"),
        ("rslad+igdm(weight=-1)", "weight=-1 must be at least 0"),
    ):
        with pytest.raises(UserError, match=words):
            parse(wrong)
