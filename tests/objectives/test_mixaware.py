"""Mix-aware training, image by image in numpy."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.objectives.formulas import Case, kl, softmax

from advalign.errors import UserError
from advalign.objectives import compose, parse, total
from advalign.threats import Linf


@pytest.mark.parametrize(("weight", "temperature", "beta"), [(0.8, 1.0, 6.0), (0.3, 0.5, 2.0)])
def test_the_loss_is_that_of_trades_on_the_mix(weight: float, temperature: float, beta: float):
    case = Case()
    g = {name: case.vanilla(x).detach().numpy() for name, x in (("x", case.x), ("x_adv", case.x_adv))}
    z, z_adv = case.logits(case.x), case.logits(case.x_adv)

    def mix(f: np.ndarray, g: np.ndarray) -> np.ndarray:
        return np.log((1 - weight) * softmax(g / temperature) + weight * softmax(f))

    losses = []
    for i, y in enumerate(case.labels):
        m, m_adv = mix(z[i], g["x"][i]), mix(z_adv[i], g["x_adv"][i])
        losses.append(-m[y] + beta * kl(m, m_adv))
    spelled = f"mixaware(weight={weight}, temperature={temperature}, beta={beta})"
    assert case.loss(spelled) == pytest.approx(float(np.mean(losses)), rel=1e-9)


def test_with_nearly_all_the_weight_it_is_trades():
    case = Case()
    assert case.loss("mixaware(weight=0.99999999)") == pytest.approx(case.loss("trades"), rel=1e-6)


def test_the_attack_sees_the_vanilla_model_and_the_step_moves_the_student_alone():
    case = Case()
    vanilla = copy.deepcopy(case.vanilla)
    objective = compose(parse("mixaware(weight=0.05)"), student=copy.deepcopy(case.student), vanilla=vanilla).train()
    torch.manual_seed(0)
    x_adv = objective.perturb(case.x, case.y, Linf(0.1), steps=5)
    moved = {name: compose(parse(name), student=copy.deepcopy(case.student)).train() for name in ("trades",)}
    torch.manual_seed(0)
    alone = moved["trades"].perturb(case.x, case.y, Linf(0.1), steps=5)
    assert not torch.equal(x_adv, alone)
    with torch.no_grad():
        kls = [
            sum(kl(a, b) for a, b in zip(vanilla(case.x).numpy(), vanilla(each).numpy(), strict=True))
            for each in (x_adv, alone)
        ]
    assert kls[0] > kls[1]  # the vanilla model decides at this weight, so it is what is attacked
    total(objective(case.x, x_adv, case.y)).backward()
    assert all(parameter.grad is None for parameter in vanilla.parameters())
    assert all(parameter.grad is not None for parameter in objective.student.parameters())


@pytest.mark.parametrize("spelled", ["mixaware(weight=0)", "mixaware(weight=1)", "mixaware(temperature=0)"])
def test_what_is_no_mix_is_refused(spelled: str):
    with pytest.raises(UserError, match="must be"):
        parse(spelled)


def test_it_is_exported_alone():
    student = tiny(0)
    objective = compose(parse("mixaware"), student=student, vanilla=tiny(1)).train()
    assert objective.exported_student() is student or set(objective.exported_student().state_dict()) == set(
        student.state_dict()
    )
