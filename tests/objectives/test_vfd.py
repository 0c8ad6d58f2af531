"""VFD's readings of its paper, its layers, and what it logs for calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.networks import TinyNet, tiny
from tests.objectives.formulas import Case, ce
from tests.samples import batch

from advalign import models
from advalign.errors import UserError
from advalign.models import Tapped
from advalign.objectives import compose, parse, total
from advalign.threats import Linf

READINGS = {
    "euclidean": lambda gap: np.mean([np.sqrt((g**2).sum()) for g in gap]),
    "squared": lambda gap: np.mean([(g**2).sum() for g in gap]),
    "mean-squared": lambda gap: (gap**2).mean(),
    "whole-batch": lambda gap: np.sqrt((gap**2).sum()),
}


@pytest.mark.parametrize("distance", READINGS)
def test_readings_of_the_distance(distance: str):
    case = Case()
    target = case.vanilla.layer2(case.vanilla.layer1(case.x)).detach().numpy()
    read = READINGS[distance]
    added = read(case.maps(case.x) - target) + read(case.maps(case.x_adv) - target)
    expected = case.loss("trades") + 0.03 * added
    assert case.loss(f"trades+vfd(weight=0.03, distance={distance})") == pytest.approx(expected, rel=1e-9)


def test_several_layers_add_up():
    case = Case()
    plain = case.loss("mart")
    each = [case.loss(f"mart+vfd(layer={layer})") - plain for layer in ("layer1", "layer2", "penultimate", "logits")]
    together = case.loss("mart+vfd(layer=(layer1, layer2, penultimate, logits))") - plain
    assert together == pytest.approx(sum(each), rel=1e-9)


def test_penultimate_is_the_pooled_last_stage():
    case = Case()
    target = case.vanilla.layer2(case.vanilla.layer1(case.x)).mean((2, 3)).detach().numpy()
    gaps = [case.maps(images).mean((2, 3)) - target for images in (case.x, case.x_adv)]
    added = sum(np.linalg.norm(gap, axis=1).mean() for gap in gaps)
    assert case.loss("at+vfd(layer=penultimate)") == pytest.approx(case.loss("at") + 0.02 * added, rel=1e-9)


@pytest.mark.parametrize("name", models.MODELS)
def test_penultimate_is_what_the_last_linear_layer_reads_in_every_network(name: str):
    net = models.build(f"{name}(width=2)", classes=10).eval()
    out = Tapped(net, ("penultimate",))(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(models.last_linear(net)(out.features["penultimate"]), out.logits)


@pytest.mark.parametrize("base", ["at", "alp", "mart"])
def test_eq6_adds_clean_cross_entropy_where_there_is_none(base: str):
    case = Case()
    added = case.mean(lambda z, q, y: ce(z, y))
    assert case.loss(f"{base}+vfd(eq6=true)") == pytest.approx(case.loss(f"{base}+vfd") + added, rel=1e-9)


@pytest.mark.parametrize("base", ["trades", "hat", "alp(mix=0.5)"])
def test_eq6_is_refused_where_both_readings_agree(base: str):
    with pytest.raises(UserError, match="leave it out"):
        parse(f"{base}+vfd(eq6=true)")


def test_the_student_may_begin_as_the_vanilla_model():
    x, y = batch()
    student, vanilla = tiny(0), tiny(7)
    objective = compose(parse("trades+vfd(init=vanilla)"), student=student, vanilla=vanilla)
    assert all(map(torch.equal, student.state_dict().values(), vanilla.state_dict().values()))
    terms = objective.eval()(x, x, y)
    assert terms["vfd"].value < 1e-4
    total(terms).backward()  # the gradient at distance 0 is finite
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.parameters())
    with pytest.raises(UserError, match=r"the vanilla initialises the student.*one architecture"):
        compose(parse("trades+vfd(init=vanilla)"), student=tiny(0), vanilla=tiny(0, classes=5))


def test_calibration_is_what_finite_differences_say_and_changes_nothing():
    """Move one image's features a little along a direction: each loss changes by its gradient."""
    x, y = batch()
    objective = compose(parse("trades+vfd(weight=0.5)"), student=tiny(0), vanilla=tiny(7)).train()
    x, x_adv = x.double(), (x + 0.05).clamp(0, 1).double()
    objective.double()
    before = {key: value.clone() for key, value in objective.state_dict().items()}
    log = objective.calibrate(x, x_adv, y)["vfd"]["layer2"]
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    assert all(p.grad is None for p in objective.parameters())
    # The term's gradient is known in closed form: a unit vector for each of the two views, times the weight.
    assert log["gradient_vfd"].item() == pytest.approx(0.5 * 2**0.5, rel=1e-9)
    # That of the clean cross entropy with respect to the map is W^T (p - e_y), spread evenly over its cells.
    net = objective.student
    assert isinstance(net, TinyNet)
    z = net(x)
    error = z.softmax(1) - torch.nn.functional.one_hot(y, 4)
    cells = 16
    expected = (error @ net.fc.weight).norm(dim=1).mean() / cells**0.5
    assert log["gradient_labels"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert log["ratio"].item() == pytest.approx(0.5 * 2**0.5 / expected.item(), rel=1e-6)
    assert log["gradient_ties"] > 0
    terms = objective(x, x_adv, y)
    assert (log["distance_clean"] + log["distance_adv"]).item() == pytest.approx(terms["vfd"].value.item(), rel=1e-9)


def test_calibration_has_no_ratio_where_no_term_supervises(x_y):
    x, y = x_y
    objective = compose(parse("rslad+vfd"), student=tiny(0), vanilla=tiny(7), robust=tiny(8)).train()
    log = objective.calibrate(x, x, y)["vfd"]["layer2"]
    assert "ratio" not in log
    assert all(value.isfinite() for value in log.values())


def test_other_guests_need_not_have_the_layer(x_y):
    """A robust teacher of another architecture, as the distillation papers have it, beside a vanilla one."""
    x, y = x_y
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    objective = compose(parse("rslad+vfd"), student=tiny(0), vanilla=tiny(7), robust=teacher).train()
    total(objective(x, objective.perturb(x, y, Linf()), y)).backward()


def test_the_student_of_ar_at_may_begin_as_the_vanilla_model_too():
    objective = compose(parse("at+ar-at+vfd(init=vanilla)"), student=tiny(0), vanilla=tiny(7))
    begun = objective.exported_student().state_dict()
    assert all(torch.equal(value, begun[key]) for key, value in tiny(7).state_dict().items())


def test_only_methods_that_log_something_pay_for_it(x_y):
    x, y = x_y
    objective = compose(parse("trades"), student=tiny(0)).train()
    calls = []
    objective.student.register_forward_hook(lambda *_: calls.append(1))
    assert objective.calibrate(x, x, y) == {}
    assert not calls


@pytest.mark.parametrize("layer", ['("layer1", "layer1")', "()"])
def test_layers_are_named_once(layer: str):
    with pytest.raises(UserError, match="must name layers"):
        parse(f"trades+vfd(layer={layer})")
