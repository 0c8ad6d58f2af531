"""A whole step on the device `meta`, which holds no values: a tensor left on another device, and a value read, fail."""

from __future__ import annotations

import pytest
import torch
from tests.networks import tiny
from tests.objectives.short_training import GUESTS, combinations, every_part_quick, mirrored

from advalign.objectives import Objective, parse, total
from advalign.threats import L2, Linf
from advalign.training.weight_perturbation import adversarial_weights

ALL = [  # parts do not move each other's tensors
    *every_part_quick(combinations(0) + combinations(1)),
    "mtard(balanced=true)",
    "score(form=at)",
]


def on_meta(method: str, dtype: torch.dtype = torch.float32):
    """Bind a method to networks that are on the device already, as `compose(..., student=net.cuda())` does."""
    guests = {name: tiny(k).to("meta", dtype) for k, name in enumerate(GUESTS, start=7)}
    objective = Objective(parse(method), tiny(0).to("meta", dtype), guests, images=64).train()
    x = torch.empty(8, 3, 8, 8, device="meta", dtype=dtype)
    y = torch.empty(8, device="meta", dtype=torch.long)
    objective.start_epoch([(x, y)], progress=0.5)
    return objective, x, y


@pytest.mark.parametrize("method", ALL)
def test_a_step_stays_on_the_students_device_and_reads_no_value(method: str):
    objective, x, y = on_meta(method)
    x_adv = objective.perturb(x, y, Linf(), second=mirrored(objective, x), steps=1)
    terms = objective(x, x_adv, y, mirrored(objective, x), y)
    total(terms).backward()
    assert all(term.value.is_meta for term in terms.values())
    assert all(p.grad is not None and p.grad.is_meta for p in objective.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["trades", "at+ar-at", "mtard"])
def test_an_l2_attack_in_train_mode_and_perturbed_weights_stay_there_too(method: str):
    objective, x, y = on_meta(method)
    x_adv = objective.perturb(x, y, L2(0.5), steps=2, mode="train")
    with adversarial_weights(objective, 0.01, lambda: objective(x, x_adv, y)):
        assert total(objective(x, x_adv, y)).is_meta


@pytest.mark.parametrize("method", ["at+ar-at", "mtard", "ikl", "at+part"])
def test_the_parts_compute_in_the_numeric_type_of_the_student(method: str):
    objective, x, y = on_meta(method, torch.float64)
    x_adv = objective.perturb(x, y, Linf(), second=mirrored(objective, x), steps=1)
    assert total(objective(x, x_adv, y, mirrored(objective, x))).dtype == torch.float64
