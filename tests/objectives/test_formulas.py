"""Each method's loss against its paper's formula, written out again in numpy, image by image."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.objectives.formulas import Case, ce, kl, softmax
from tests.samples import batch

from advalign.errors import UserError
from advalign.objectives import Objective, compose, parse, total


def bce(z_adv: np.ndarray, y: int) -> float:
    q = softmax(z_adv)
    second = max(q[k] for k in range(len(q)) if k != y)
    return -np.log(q[y]) - np.log(1.0001 - second)


def test_natural_and_at():
    case = Case()
    assert case.loss("natural") == pytest.approx(case.mean(lambda z, z_adv, y: ce(z, y)), rel=1e-9)
    assert case.loss("at") == pytest.approx(case.mean(lambda z, z_adv, y: ce(z_adv, y)), rel=1e-9)


def test_alp_pairs_by_the_mean_over_images_and_classes():
    case = Case()
    expected = case.mean(lambda z, z_adv, y: ce(z_adv, y) + np.mean((z_adv - z) ** 2))
    assert case.loss("alp") == pytest.approx(expected, rel=1e-9)
    mixed = case.mean(lambda z, z_adv, y: 0.5 * ce(z, y) + 0.5 * ce(z_adv, y) + 0.5 * np.mean((z_adv - z) ** 2))
    assert case.loss("alp(mix=0.5, beta=0.5)") == pytest.approx(mixed, rel=1e-9)


def test_trades_sums_over_classes_and_averages_over_the_batch():
    case = Case()
    assert case.loss("trades") == pytest.approx(case.mean(lambda z, q, y: ce(z, y) + 6 * kl(z, q)), rel=1e-9)
    assert case.loss("trades(beta=2)") == pytest.approx(case.mean(lambda z, q, y: ce(z, y) + 2 * kl(z, q)), rel=1e-9)


def test_mart():
    case = Case()
    expected = case.mean(lambda z, q, y: bce(q, y) + 5 * kl(z, q) * (1 - softmax(z)[y]))
    assert case.loss("mart") == pytest.approx(expected, rel=1e-5)  # the authors' 1.0000001


def test_hat_takes_labels_from_the_vanilla_model_at_x_adv_and_does_not_clamp_the_helper():
    case = Case()
    helper = case.x + 2 * (case.x_adv - case.x)
    assert helper.min() < 0 or helper.max() > 1
    labels = case.vanilla(case.x_adv).argmax(1).tolist()
    extra = np.mean([ce(z, k) for z, k in zip(case.logits(helper), labels, strict=True)])
    expected = case.mean(lambda z, q, y: ce(z, y) + 2.5 * kl(z, q)) + 0.5 * extra
    assert case.loss("hat") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("base", ["at", "alp", "trades", "mart", "hat"])
def test_vfd_adds_unsquared_distances_per_image_to_any_base(base: str):
    case = Case()
    target = case.vanilla.layer2(case.vanilla.layer1(case.x)).detach().numpy()
    clean, adv = case.maps(case.x), case.maps(case.x_adv)
    gaps = [
        np.sqrt(((clean[i] - target[i]) ** 2).sum()) + np.sqrt(((adv[i] - target[i]) ** 2).sum())
        for i in range(len(case.labels))
    ]
    expected = case.loss(base) + 0.05 * np.mean(gaps)
    assert case.loss(f"{base}+vfd(weight=0.05)") == pytest.approx(expected, rel=1e-9)
    assert case.loss(f"{base}+vfd(weight=0.05, layer=layer2)") == pytest.approx(expected, rel=1e-9)


def soft(z: np.ndarray, teacher: np.ndarray, t: float = 2.0) -> float:
    return -(t**2) * sum(softmax(teacher / t) * np.log(softmax(z / t)))


LABELS = {  # the term that fits hard labels in each base, image by image; the rest of its loss stays under kd and bgat
    "at": lambda z, q, y: ce(q, y),
    "alp": lambda z, q, y: ce(q, y),
    "trades": lambda z, q, y: ce(z, y),
    "mart": lambda z, q, y: bce(q, y),
    "hat": lambda z, q, y: ce(z, y),
}


@pytest.mark.parametrize("base", LABELS)
def test_kd_scales_labels_and_adds_two_soft_teachers_on_adversarial_images(base: str):
    case = Case()
    z_adv = case.logits(case.x_adv)
    robust, vanilla = (net(case.x_adv).detach().numpy() for net in (case.robust, case.vanilla))
    n = range(len(case.labels))
    added = np.mean([0.6 * soft(z_adv[i], robust[i]) + 0.1 * soft(z_adv[i], vanilla[i]) for i in n])
    expected = case.loss(base) - 0.7 * case.mean(LABELS[base]) + added
    assert case.loss(f"{base}+kd") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("base", LABELS)
def test_bgat_and_lbgat_replace_labels_by_a_guides_logits(base: str):
    case = Case()
    z_adv, vanilla = case.logits(case.x_adv), case.vanilla(case.x).detach().numpy()
    guide = copy.deepcopy(case.guide).train()(case.x).detach().numpy()  # in train mode: it learns
    rest = case.loss(base) - case.mean(LABELS[base])
    assert case.loss(f"{base}+bgat") == pytest.approx(rest + ((z_adv - vanilla) ** 2).mean(), rel=1e-9)
    own = np.mean([ce(guide[i], y) for i, y in enumerate(case.labels)])
    assert case.loss(f"{base}+lbgat") == pytest.approx(rest + ((z_adv - guide) ** 2).mean() + own, rel=1e-9)
    added = case.loss(base) + 0.5 * ((z_adv - vanilla) ** 2).mean()
    assert case.loss(f"{base}+bgat(weight=0.5, additive=true)") == pytest.approx(added, rel=1e-9)


def test_the_guide_of_lbgat_is_taught_by_its_labels_and_by_the_student():
    """The squared distance moves the guide too: its gradient is not that of its cross entropy alone."""
    case = Case()
    objective = compose(parse("trades+lbgat"), student=case.student, guide=case.guide).train()
    terms = objective(case.x, case.x_adv, case.y)
    weight = next(objective.nets["guide"].parameters())
    (pull,) = torch.autograd.grad(terms["lbgat"].value, weight, retain_graph=True)
    assert pull.abs().max() > 0


def test_vfd_on_logits():
    case = Case()
    target = case.vanilla(case.x).detach().numpy()
    gaps = np.linalg.norm(case.logits(case.x) - target, axis=1) + np.linalg.norm(
        case.logits(case.x_adv) - target, axis=1
    )
    assert case.loss("trades+vfd(layer=logits)") == pytest.approx(case.loss("trades") + 0.02 * gaps.mean(), rel=1e-9)


def test_vfd_gradient_is_finite_when_the_student_is_the_vanilla_model():
    x, y = batch()
    objective = compose(parse("trades+vfd"), student=tiny(0), vanilla=tiny(0)).eval()
    total(objective(x, x, y)).backward()
    assert all(p.grad.isfinite().all() for p in objective.parameters() if p.grad is not None)


def test_vfd_names_both_shapes_when_architectures_differ():
    wide = tiny(0)
    wide.layer2 = torch.nn.Sequential(torch.nn.Conv2d(6, 9, 3))
    wide.fc = torch.nn.Linear(9, 4)
    objective = compose(parse("trades+vfd"), student=tiny(0), vanilla=wide)
    x, y = batch()
    with pytest.raises(UserError, match=r"\(8, 4, 4\).*\(9, 6, 6\)"):
        objective(x, x, y)


@pytest.mark.parametrize("method", ["natural", "at", "alp(mix=0.3)", "trades", "mart+kd", "hat+vfd"])
def test_label_smoothing_mixes_a_uniform_label_into_terms_that_supervise(method: str):
    case = Case()
    guests = {name: copy.deepcopy(getattr(case, name)) for name in ("vanilla", "robust")}

    def terms(smoothing: float):
        net = copy.deepcopy(case.student)
        objective = Objective(parse(method), net, copy.deepcopy(guests), label_smoothing=smoothing).train()
        return objective(case.x, case.x_adv, case.y)

    plain, smooth = terms(0), terms(0.2)
    z = {"clean": case.logits(case.x), "adv": case.logits(case.x_adv)}
    for name, term in plain.items():
        expected = term.value.item()
        if term.supervises:
            uniform = np.mean([ce(row, k) for row in z[term.supervises] for k in range(4)])
            expected = 0.8 * expected + 0.2 * uniform
        assert smooth[name].value.item() == pytest.approx(expected, rel=1e-9), name
    assert {name for name, term in plain.items() if term.supervises}


def test_label_smoothing_of_cross_entropy_is_torchs():
    case = Case()
    objective = Objective(parse("natural"), copy.deepcopy(case.student), {}, label_smoothing=0.1).train()
    expected = torch.nn.functional.cross_entropy(
        copy.deepcopy(case.student).train()(case.x), case.y, label_smoothing=0.1
    )
    torch.testing.assert_close(total(objective(case.x, case.x_adv, case.y)), expected)
