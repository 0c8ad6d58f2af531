"""Soft targets: what the loss and the attack read in the place of labels, and the averages that make them.

ADR was stepped beside its authors' code (adr.py, and the loss and average of advTrainer.py) for 35 momentum steps in
float64, on AT and on TRADES: losses and weights agree to 1e-15.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.networks import tiny
from tests.objectives.formulas import Case, kl, softmax
from tests.objectives.short_training import begun

from advalign.data import Images
from advalign.data.batches import Batches, Epoch
from advalign.errors import UserError
from advalign.models import Output
from advalign.objectives import Method, Objective, compose, parse, total
from advalign.objectives.bases.at import AT
from advalign.objectives.contract import Need, Outputs, Terms
from advalign.objectives.method import PlugIn
from advalign.objectives.plugins.adr import ADR
from advalign.objectives.plugins.sglr import SGLR
from advalign.shapes import Labels
from advalign.threats import Linf
from advalign.training.averaging import Average
from advalign.training.recipes import Recipe


def adr_label(z: np.ndarray, y: int, t: float) -> np.ndarray:
    """The soft label of one image from the average's logits, at a share t of the training."""
    down = 0.5 * (1 + math.cos(math.pi * t))
    q = softmax(z / (2.0 + (2.5 - 2.0) * down))
    mix = 0.95 + (0.7 - 0.95) * down - (max(q) - q[y])
    mix = min(max(mix, 0.0), 1.0)
    return np.array([mix * q[k] + (1 - mix) * (k == y) for k in range(len(q))])


def soft_ce(z: np.ndarray, target: np.ndarray) -> float:
    return -float(sum(target * np.log(softmax(z))))


def bound(method: str, case: Case) -> Objective:
    return begun(compose(parse(method), student=copy.deepcopy(case.student)).double().train())


@pytest.mark.parametrize("t", [0.0, 0.3])
def test_adr_softens_every_label_term(t: float):
    case = Case()
    average = copy.deepcopy(case.student).eval()(case.x).detach().numpy()
    z, z_adv = case.logits(case.x), case.logits(case.x_adv)
    labels = [adr_label(average[i], y, t) for i, y in enumerate(case.labels)]
    n = range(len(labels))
    boosted = [math.log(1.0001 - max(np.delete(softmax(z_adv[i]), y))) for i, y in enumerate(case.labels)]
    unsure = [1 - softmax(z[i])[y] for i, y in enumerate(case.labels)]
    expected = {
        "at": np.mean([soft_ce(z_adv[i], labels[i]) for i in n]),
        "trades": np.mean([soft_ce(z[i], labels[i]) + 6 * kl(z[i], z_adv[i]) for i in n]),
        "mart": np.mean([soft_ce(z_adv[i], labels[i]) - boosted[i] + 5 * kl(z[i], z_adv[i]) * unsure[i] for i in n]),
    }
    for base, value in expected.items():
        objective = bound(f"{base}+adr", case)
        objective.start_step(t)
        assert total(objective(case.x, case.x_adv, case.y)).item() == pytest.approx(value, rel=1e-5)


def test_adr_leaves_other_terms_and_scaled_ones_have_soft_labels_too():
    case = Case()
    guests = {name: copy.deepcopy(getattr(case, name)) for name in ("robust", "vanilla")}
    plain, soft = (
        begun(compose(parse(method), student=copy.deepcopy(case.student), **copy.deepcopy(guests)).double().train())
        for method in ("trades+kd", "trades+adr+kd")
    )
    hard_terms, soft_terms = plain(case.x, case.x_adv, case.y), soft(case.x, case.x_adv, case.y)
    assert hard_terms.keys() == soft_terms.keys()
    for name, term in hard_terms.items():
        assert (term.value == soft_terms[name].value).item() == (not term.supervises)
        assert term.weight == soft_terms[name].weight


@pytest.mark.parametrize("base", ["at", "trades", "mart"])
def test_without_mixing_the_label_is_the_hard_one_to_the_bit(base: str):
    case = Case()
    found = []
    for method in (base, f"{base}+adr(mix_start=0, mix_end=0)"):
        objective = bound(method, case)
        torch.manual_seed(0)
        x_adv = objective.perturb(case.x, case.y, Linf(), steps=2)
        found.append((x_adv, total(objective(case.x, x_adv, case.y))))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=0, atol=1e-12)
    assert torch.equal(found[1][1], found[0][1])


def test_the_label_stays_the_likeliest_class_whatever_the_average_says():
    draw = torch.Generator().manual_seed(0)
    for mix in (0.0, 0.5, 0.95, 1.0):
        part = ADR(mix_start=mix, mix_end=mix, temperature_start=1.0, temperature_end=1.0)
        logits, y = 6 * torch.randn(5000, 10, generator=draw), torch.randint(10, (5000,), generator=draw)
        target = part.soft_targets({ADR.EMA: Output(logits, {})}, y, None)
        torch.testing.assert_close(target.sum(1), torch.ones(5000))
        assert (target.gather(1, y[:, None]).squeeze(1) >= target.amax(1) - 1e-6).all()


def test_the_annealing_ends_where_it_should():
    part = ADR()
    for progress, mix, t in ((0.0, 0.7, 2.5), (0.5, 0.825, 2.25), (1.0, 0.95, 2.0)):
        part.start_step(progress)
        found = part._annealed(part.mix_start, part.mix_end), part._annealed(2.5, 2.0)
        assert [float(each) for each in found] == pytest.approx([mix, t])


def test_the_attack_climbs_the_cross_entropy_of_the_soft_labels():
    case = Case()
    objective, eps = bound("at+adr", case), 8 / 255
    torch.manual_seed(3)
    x_adv = objective.perturb(case.x, case.y, Linf(eps), steps=4)
    net = copy.deepcopy(objective.student).eval()
    average = net(case.x).detach().numpy()
    target = torch.tensor(np.stack([adr_label(average[i], y, 0.0) for i, y in enumerate(case.labels)]))
    torch.manual_seed(3)
    plain = (case.x + torch.empty_like(case.x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(4):
        plain = plain.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(plain), target), plain)
        plain = (case.x + (plain.detach() + eps / 4 * grad.sign() - case.x).clamp(-eps, eps)).clamp(0, 1)
    torch.testing.assert_close(x_adv, plain, atol=1e-9, rtol=0)


def test_the_average_follows_weights_and_statistics_and_nothing_else_moves_it():
    case = Case()
    objective = bound("trades+adr(decay=0.9)", case)
    average = objective.nets["ema"].get_submodule("net")
    before = {key: value.clone() for key, value in average.state_dict().items()}
    total(objective(case.x, case.x_adv, case.y)).backward()
    with torch.no_grad():
        for p in objective.student.parameters():
            p.sub_(torch.full_like(p, 0.1) if p.grad is None else 0.1 * p.grad)
    assert all(p.grad is None and not p.requires_grad for p in average.parameters())
    assert not average.training
    assert all(torch.equal(value, before[key]) for key, value in average.state_dict().items())
    objective.after_update()
    for key, live in objective.student.state_dict().items():
        if live.is_floating_point():
            torch.testing.assert_close(average.state_dict()[key], 0.9 * before[key] + 0.1 * live)
    assert any("running_mean" in key and not torch.equal(average.state_dict()[key], before[key]) for key in before)


def test_a_loop_that_forgets_the_average_is_told_so_and_not_trained_by_another_method():
    case = Case()
    objective = bound("at+adr", case)
    objective.start_epoch([], 0.0)
    with pytest.raises(UserError, match=r"'adr' keeps an average of the student: call objective.after_update\(\)"):
        objective.start_epoch([], 0.5)
    objective.after_update()
    objective.start_epoch([], 0.5)


@pytest.mark.parametrize("method", ["at+adr", "at+igdm", "at+qub(decreasing=true)"])
def test_a_state_that_goes_on_within_an_epoch_is_told_how_far_it_is(method: str):
    """The progress is no state: at 0, IGDM would have no weight, and ADR the labels of the first step."""
    case = Case()
    objective = compose(parse(method), student=copy.deepcopy(case.student), robust=copy.deepcopy(case.robust)).double()
    objective.train().load_state_dict(objective.state_dict())
    with pytest.raises(UserError, match=r"follows the epochs: .* objective.start_step\(step / steps\) where a loaded"):
        objective(case.x, case.x_adv, case.y)
    objective.start_step(0.7)
    objective(case.x, case.x_adv, case.y)
    steady = compose(parse("at+qub"), student=copy.deepcopy(case.student)).double().train()
    steady.load_state_dict(steady.state_dict())
    steady(case.x, case.x_adv, case.y)


def test_the_average_is_state_and_no_guest():
    objective = compose(parse("at+adr"), student=tiny(0))
    assert objective.method.guests == ()
    assert any(key.startswith("nets.ema.") for key in objective.learned_state())
    assert Need("ema", "clean") in objective.method.needs


def test_smoothed_labels_beside_soft_ones_are_refused():
    with pytest.raises(UserError, match=r"'adr' replaces the labels by soft targets: label_smoothing=0\.1 must be 0"):
        compose(parse("at+adr"), student=tiny(0), label_smoothing=0.1)


def test_refusals_of_adr():
    for wrong, words in (
        ("mix_end=1.5", "mix_end=1.5 must be in"),
        ("temperature_end=0", "temperature_end=0 must be above 0"),
        ("decay=1", "decay=1 must be in"),
    ):
        with pytest.raises(UserError, match=words):
            parse(f"at+adr({wrong})")
    with pytest.raises(UserError, match="'adr' takes the place of hard labels, but mtard has none"):
        parse("mtard+adr")


def test_the_average_of_the_method_is_what_is_validated_if_asked_for():
    objective, epoch = bound("at+adr", Case()), Epoch(None, 0)  # type: ignore[arg-type]
    with Average(objective, Recipe(average="method"), steps=4).applied(epoch) as student:
        assert student is objective.nets.get_submodule("ema.net")
    with (
        pytest.raises(UserError, match="at keeps no average of the student: take average=ema or swa"),
        Average(bound("at", Case()), Recipe(average="method"), steps=4).applied(epoch),
    ):
        pass


def test_rebat_ties_the_student_to_its_average_once_it_has_begun():
    """Stepped through `Step` with the preset beside the authors' loop (train_cifar_wa.py), they agree to 1e-15."""
    case = Case()
    objective, plain = bound("at+rebat(weight=2, decay=0.5)", case), bound("at", case)
    average = objective.nets["ema"].get_submodule("net")
    for epoch in (0, 104):
        objective.start_epoch([], epoch / 200)
        assert torch.equal(total(objective(case.x, case.x_adv, case.y)), total(plain(case.x, case.x_adv, case.y)))
        objective.after_update()
        for mine, live in zip(average.buffers(), objective.student.buffers(), strict=True):
            assert torch.equal(mine, live) or not live.is_floating_point()
    objective.start_epoch([], 105 / 200)
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.mul_(1.5)
    w = average(case.x_adv).detach().numpy()
    z = copy.deepcopy(objective.student)(case.x_adv).detach().numpy()
    expected = np.mean([-math.log(softmax(z[i])[y]) + 2 * kl(w[i], z[i]) for i, y in enumerate(case.labels)])
    loss = total(objective(case.x, case.x_adv, case.y))
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    loss.backward()
    assert all(p.grad is None for p in average.parameters())
    before = {key: value.clone() for key, value in average.named_parameters()}
    objective.after_update()
    for key, live in objective.student.named_parameters():
        torch.testing.assert_close(average.get_parameter(key), (before[key] + live) / 2)


def test_whether_rebat_has_begun_is_state():
    objective, resumed = bound("at+rebat", Case()), bound("at+rebat", Case())
    objective.start_epoch([], 0.6)
    resumed.load_state_dict(objective.state_dict())
    plugin = resumed.method.plugins[0]
    assert plugin.average_decay() == 0.999


def test_refusals_of_rebat():
    for wrong, words in (
        ("begin=2", r"begin=2 must be in"),
        ("decay=1", "decay=1 must be"),
        ("weight=-1", "weight=-1"),
    ):
        with pytest.raises(UserError, match=words):
            parse(f"at+rebat({wrong})")


def test_sglr_moves_each_images_label_to_the_answers_of_its_visits():
    """Stepped beside the authors' class (losses/loss.py, SGLS) across its begin: loss, table and BatchNorm to 1e-15."""
    case = Case()
    objective = compose(parse("at+sglr"), student=copy.deepcopy(case.student), images=20).double().train()
    objective.start_epoch([], 90 / 200)
    z, q = case.logits(case.x), case.logits(case.x_adv)
    rows = torch.tensor([3, 19, 0, 7, 11, 12, 5, 6])
    labels = [np.eye(4)[y] for y in case.labels]
    for _ in range(2):  # two visits with the same weights, the statistics of BatchNorm aside
        labels = [0.9 * s + 0.1 * (0.2 * softmax(z[i]) + 0.8 * softmax(q[i])) for i, s in enumerate(labels)]
        expected = np.mean([soft_ce(q[i], s) for i, s in enumerate(labels)])
        found = total(objective(case.x, case.x_adv, case.y, None, rows))
        assert found.item() == pytest.approx(expected, rel=1e-9)
    plugin = objective.method.plugins[0]
    assert isinstance(plugin, SGLR)
    assert plugin.table is not None
    np.testing.assert_allclose(plugin.table[rows].numpy(), labels, rtol=1e-12)
    torch.testing.assert_close(plugin.table[rows].sum(1), torch.ones(8, dtype=torch.double))
    assert plugin.table.sum().item() == pytest.approx(8)  # the other rows are untouched
    kept = plugin.table.clone()
    objective.eval()(case.x, case.x_adv, case.y, None, rows)
    assert torch.equal(plugin.table, kept)
    resumed = compose(parse("at+sglr"), student=copy.deepcopy(case.student), images=20).double().train()
    resumed.load_state_dict(objective.state_dict())
    assert torch.equal(resumed.method.plugins[0].get_extra_state(), kept)
    assert resumed.method.needs == objective.method.needs


def test_before_it_begins_sglr_is_the_base_to_the_bit_and_the_attack_keeps_hard_labels():
    case = Case()
    objective = compose(parse("at+sglr"), student=copy.deepcopy(case.student), images=20).double().train()
    plain = bound("at", case)
    objective.start_epoch([], 89 / 200)
    made = []
    for each in (objective, plain):
        torch.manual_seed(0)
        x_adv = each.perturb(case.x, case.y, Linf(), steps=2)
        made.append((x_adv, total(each(case.x, x_adv, case.y))))
    assert all(map(torch.equal, *made))
    assert all(map(torch.equal, objective.student.buffers(), plain.student.buffers()))


def test_what_sglr_needs_is_named():
    case = Case()
    objective = compose(parse("at+sglr(begin=0)"), student=copy.deepcopy(case.student)).double().train()
    objective.start_epoch([], 0.0)
    with pytest.raises(UserError, match="give their numbers, rows="):
        objective(case.x, case.x_adv, case.y)
    with pytest.raises(UserError, match="give their number, images="):
        objective(case.x, case.x_adv, case.y, None, torch.arange(8))


def test_sglr_refuses_several_processes_which_would_each_keep_their_own_labels(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    objective = compose(parse("at+sglr"), student=tiny(0), images=20)
    for world, refused in ((1, False), (2, True)):
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda world=world: world)
        with pytest.raises(UserError, match="several processes") if refused else nullcontext():
            objective.start_epoch([], 0.0)


def test_plug_ins_that_leave_label_terms_are_joined():
    for method in ("at+adr+bgat(additive=true)", "at+adr+kd", "at+lbgat(additive=true)+qub", "at+ar-at+sglr"):
        parse(method)


@pytest.mark.parametrize(
    ("reads", "replaces", "words"),
    [
        (Need("ema", "clean"), frozenset(), "'odd' reads an average of the student, and no plug-in keeps one"),
        (Need("student", "clean"), frozenset({"average"}), "'odd' keeps an average .*, and no part reads it"),
    ],
)
def test_an_average_that_nobody_keeps_or_reads_is_refused(reads: Need, replaces: frozenset, words: str):
    class Odd(PlugIn):
        name = "odd"
        needs = (reads,)

        def terms(self, outs: Outputs, y: Labels) -> Terms:
            return {}

    plugin = Odd()
    plugin.replaces = replaces
    with pytest.raises(UserError, match=words):
        Method(AT(), [plugin])


def test_rows_are_the_places_of_a_batchs_images():
    images = Images(torch.arange(40).view(40, 1, 1, 1).to(torch.uint8), torch.arange(40) % 4)
    batches = Batches(images, 12, augment="none", seed=3)
    for epoch, start in ((0, 0), (2, 1)):
        for rows, (x, y) in zip(batches.rows(epoch, start), batches.epoch(epoch, start), strict=True):
            assert torch.equal((255 * x).round().long().flatten(), rows)
            assert torch.equal(y, rows % 4)
