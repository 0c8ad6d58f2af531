"""Attacks in L1: the closed form of linear models, a linear program, and the authors' code."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.attacks.linear_models import EPS, linear, most
from tests.networks import Target, fooled
from torch import Tensor

from advalign.attacks import APGDCE, APGDT, FABT, Square, parse
from advalign.attacks.apgd_l1 import auto_pgd_l1
from advalign.attacks.ascent import AttackLoss
from advalign.attacks.ensemble import AutoAttack
from advalign.attacks.fab import onto_plane
from advalign.attacks.quantized import rounded
from advalign.threats import L1


@pytest.mark.parametrize("classes", [2, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("attack", [APGDT(L1(EPS), steps=60), FABT(L1(EPS), steps=20)], ids=str)
def test_all_that_a_linear_model_allows_and_no_more(attack: APGDT | FABT, classes: int):
    model, x, y, beyond = linear(classes)
    assert 10 < (beyond > 0).sum() < 55
    torch.manual_seed(0)
    broken = fooled(model, attack(model, x, y), y)
    assert not broken[beyond < 0].any()
    assert broken[beyond > 0.02].all()


def test_the_loss_comes_near_the_greedy_optimum_and_not_beyond():
    """Without a class to leave, at most by the rise when the largest weights are at their walls."""
    model, x, y, _ = linear(2)
    slope = (model[1].weight[1] - model[1].weight[0]) * (1 - 2 * y)[:, None]  # pyright: ignore[reportIndexIssue]

    def towards(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.gather(1, 1 - labels[:, None]).squeeze(1) - logits.gather(1, labels[:, None]).squeeze(1)

    torch.manual_seed(0)
    for eps in (0.3, 1.0):
        before, gain = towards(model(x), y), most(x, slope, eps)
        rows = (before + gain < 0).nonzero().squeeze(1)  # the others stop on the way
        found = auto_pgd_l1(AttackLoss(model, towards, y[rows]), x[rows], y[rows], L1(eps), steps=30)
        share = (towards(model(found), y[rows]) - before[rows]) / gain[rows]
        assert len(rows) > 10
        assert share.max() <= 1 + 1e-9
        assert share.mean() > 0.9, share


def test_the_projection_onto_a_plane_is_that_of_a_linear_program():
    optimize = pytest.importorskip("scipy.optimize")
    torch.manual_seed(0)
    x, w = torch.rand(40, 9, dtype=torch.double), torch.randn(40, 9, dtype=torch.double)
    x[:10], w[torch.rand_like(w) < 0.2] = x[:10].round(), 0
    gap = w.abs().sum(1) * torch.empty(40, dtype=torch.double).uniform_(-0.8, 0.8)
    z = onto_plane(L1(1.0), x, w, gap)
    corner = torch.where(w * gap[:, None] > 0, 1.0, torch.where(w * gap[:, None] < 0, 0.0, x))
    reached = (w * (corner - x)).sum(1).abs() >= gap.abs()
    assert 5 < reached.sum() < 40
    torch.testing.assert_close(z[~reached], corner[~reached])
    torch.testing.assert_close((w * (z - x)).sum(1)[reached], gap[reached])
    for i in reached.nonzero().squeeze(1).tolist():
        bounds = [*((0, room) for room in (1 - x[i]).tolist()), *((0, room) for room in x[i].tolist())]
        best = optimize.linprog([1.0] * 18, A_eq=torch.cat([w[i], -w[i]])[None].numpy(), b_eq=[gap[i]], bounds=bounds)
        assert (z[i] - x[i]).abs().sum().item() == pytest.approx(best.fun, abs=1e-7)


def test_autoattack_is_the_standard_of_l1():
    names = [str(member) for member in AutoAttack(L1(12)).members]
    assert names == [
        "apgd-ce(steps=100, restarts=5)", "apgd-t(steps=100, targets=5)", "fab-t(steps=100)", "square(queries=5000)"
    ]  # fmt: skip
    assert all(member.threat == L1(12) for member in AutoAttack(L1(12)).members)


def test_rounding_to_levels_stays_in_the_ball():
    torch.manual_seed(0)
    x = torch.randint(0, 256, (20, 3, 6, 6)) / 255
    for eps in (0.0, 0.05, 2.0, 9.0):
        x_adv = L1(eps).ball(x)(x + 0.3 * torch.randn_like(x))
        found = rounded(x_adv, x, L1(eps), 8)
        levels = (found.double() - x.double()) * 255
        assert (levels - levels.round()).abs().max() < 1e-3
        assert (levels.round().abs().flatten(1).sum(1) <= 255 * eps + 1e-3).all()
        assert ((found - x_adv).abs() <= 1 / 255 + 1e-6).all()


@pytest.mark.parametrize("spelling", ["pgd(steps=20)", "apgd-ce(steps=10)", "square(queries=50)"])
def test_breaks_a_trained_network(spelling: str, target: Target):
    x, y = target.x[:60], target.y[:60]
    torch.manual_seed(0)
    broken = fooled(target.model, parse(spelling, threat=L1(4.0))(target.model, x, y), y)
    assert broken.sum() > 25


def theirs(name: str, target: Target, eps: float, seed: int) -> Tensor:
    """Which images the authors' code breaks."""
    pytest.importorskip("pyautoattack")
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
    from pyautoattack.fab_pt import FABAttack_PT
    from pyautoattack.square import SquareAttack

    given: dict[str, Any] = {"norm": "L1", "eps": eps, "seed": seed, "device": "cpu"}
    apgd: dict[str, Any] = {**given, "use_largereps": True, "n_iter": 50}
    attack = {
        "apgd-ce": lambda: APGDAttack(target.model, loss="ce", **apgd),
        "apgd-t": lambda: APGDAttack_targeted(target.model, n_target_classes=2, **apgd),
        "fab-t": lambda: FABAttack_PT(target.model, n_iter=20, n_target_classes=2, targeted=True, **given),
        "square": lambda: SquareAttack(target.model, n_queries=200, resc_schedule=False, **given),
    }[name]()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = attack.perturb(target.x, target.y)
    x_adv = found[-1] if isinstance(found, tuple) else found
    return fooled(target.model, x_adv, target.y) & (L1(eps).distance(x_adv, target.x) <= eps + 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("attack", [APGDCE, APGDT, FABT, Square])
def test_as_strong_as_the_authors_code(attack: Any, target: Target):
    """Image by image for most, and over all within chance; Square's windows reach further, which counts at 8 pixels."""
    some = target._replace(x=target.x[:100], y=target.y[:100])
    arguments = {"steps": 20 if attack is FABT else 50, "targets": 2, "queries": 200}
    known = {key: value for key, value in arguments.items() if key in attack.__dataclass_fields__}
    reference = theirs(attack.name, some, 1.8, seed=0)
    torch.manual_seed(0)
    ours = fooled(some.model, attack(L1(1.8), **known)(some.model, some.x, some.y), some.y)
    assert 10 < reference.sum() < 95
    assert ours.sum() >= reference.sum() - 3
    if attack is not Square:
        assert ours.sum() <= reference.sum() + 8
        assert (ours != reference).sum() <= 12
