"""Where gradient flows: what is detached, what is frozen, whose BatchNorm moves, how often a network runs."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.networks import TinyNet, tiny
from tests.objectives.short_training import bound, combinations, every_part_quick, mirrored
from torch import nn

from advalign.errors import UserError
from advalign.models import Output, Tapped, build
from advalign.models.fold import Folded
from advalign.objectives import BASES, compose, parse, total
from advalign.objectives.bases.trades import from_clean
from advalign.objectives.contract import ADV, CLEAN
from advalign.threats import L2, Linf, Threat

METHODS = combinations(0) + combinations(1)
ATTACKED = [method for method in METHODS if method not in ("natural", "afa")]
FORWARDS = {  # of the student, with 10 steps
    "natural": 1,
    "at": 11,
    "alp": 12,
    "trades": 13,
    "mart": 12,
    "hat": 14,
    "dkl": 13,
    "ikl": 13,
    "ard": 11,
    "rslad": 12,
    "iad": 12,
    "iad2": 12,
    "adaad": 11,
    "adaiad": 12,
    "mtard": 12,
    "mixaware": 13,
    "score": 13,
    "contrast": 15,
    "afa": 1,
}
UNSEEN = {"at", "ard", "adaad"}  # bases without a clean pass of their own: a plug-in that reads one costs one more


# The passes that the papers' formulas read, network and view, of the guests.
GUESTS = {
    "hat": {("vanilla", "adv")},
    "ard": {("robust", "clean")},
    "rslad": {("robust", "clean")},
    "iad": {("robust", "clean"), ("robust", "adv")},
    "iad2": {("robust", "adv"), ("vanilla", "adv")},
    "adaad": {("robust", "adv")},
    "mtard": {("robust", "adv"), ("vanilla", "clean")},
    "mixaware": {("vanilla", "clean"), ("vanilla", "adv")},
    "kd": {("robust", "adv"), ("vanilla", "adv")},
    "bgat": {("vanilla", "clean")},
    "lbgat": {("guide", "clean")},
    "generalist": {("natural", "clean")},
    "vfd": {("vanilla", "clean")},
    "adr": {("ema", "clean")},
    "rebat": {("ema", "adv")},
    "igdm": {("robust", "adv"), ("robust", "minus")},
    "adaiad": {("robust", "adv")},
}
LEARNERS = {"lbgat": "guide", "generalist": "natural"}
IN_THE_ATTACK = {
    "rslad": {"robust": 1},
    "adaad": {"robust": 10},
    "adaiad": {"robust": 10},
    "mixaware": {"vanilla": 11},
}  # passes of guests in an attack of 10 steps
LABELS_IN_THE_ATTACK = {"at", "alp", "mart", "iad2"}  # bases with label terms whose attack climbs their cross entropy
KEEPS_COUNT = {"mtard", "ar-at"}  # parts whose own buffers move in a step


def outs_of(z: torch.Tensor, z_adv: torch.Tensor):
    return {CLEAN: Output(z, {}), ADV: Output(z_adv, {})}


@pytest.mark.parametrize("base", ["trades", "mart", "alp"])
def test_no_detach_in_the_tie_of_clean_and_adversarial_logits(base: str):
    z, z_adv = torch.randn(5, 4, dtype=torch.double), torch.randn(5, 4, dtype=torch.double)
    y = torch.tensor([0, 1, 2, 3, 0])
    part = BASES[base]()

    def loss(z: torch.Tensor, z_adv: torch.Tensor) -> torch.Tensor:
        return total(part.terms(outs_of(z, z_adv), y))

    # Finite differences know of no detach: they agree with autograd only if every path carries gradient.
    assert torch.autograd.gradcheck(loss, (z.requires_grad_(), z_adv.requires_grad_()), atol=1e-5)


def test_kl_is_zero_and_flat_at_the_clean_image(x_y):
    x, y = x_y
    terms = bound("trades").eval()(x, x, y)
    assert terms["kl"].value.abs() < 1e-6


@pytest.mark.parametrize("method", every_part_quick(ATTACKED))
def test_a_clean_start_is_refused_exactly_where_the_loss_of_the_attack_is_flat(method: str, x_y):
    x, y = x_y
    objective = bound(method).double().eval()
    nets: dict[str, Any] = dict(objective.nets.items())
    nets |= {name: net.get_submodule("net") for name, net in nets.items() if name != "student"}
    nets |= {name: lambda x, net=net: Output(net(x), {}) for name, net in nets.items() if name != "student"}
    x = x.double().requires_grad_()
    views = {"clean": x.detach(), "second": x.detach().flip(3)}
    loss = objective.method.base.attack_loss(nets, views, y)
    (slope,) = torch.autograd.grad(loss.loss(loss.network(x), loss.target).sum(), x)
    flat = float(slope.abs().max()) < 1e-12
    assert loss.flat_at_clean == flat
    if flat:
        with pytest.raises(UserError, match="flat at the clean images; start=clean needs another"):
            objective.perturb(x.detach(), y, Linf(), second=mirrored(objective, x.detach()), start="clean")
    else:
        objective.perturb(x.detach(), y, Linf(), second=mirrored(objective, x.detach()), start="clean", steps=1)


@pytest.mark.parametrize("method", every_part_quick(METHODS))
def test_gradients_reach_the_student_and_nothing_else(method: str, x_y):
    x, y = x_y
    objective = bound(method)
    x_adv = objective.perturb(x, y, Linf(), second=mirrored(objective, x))
    total(objective(x, x_adv, y, mirrored(objective, x))).backward()
    learnt = [p for p in objective.student.parameters() if method != "afa" or p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learnt)
    for guest in objective.nets.keys() - {"student"}:
        learns = guest == LEARNERS.get(method.partition("+")[2])
        assert all((p.grad is not None) == p.requires_grad == learns for p in objective.nets[guest].parameters())
    assert not x.requires_grad
    assert not x_adv.requires_grad


@pytest.mark.parametrize("method", every_part_quick(METHODS))
def test_buffers_of_frozen_guests_stay_to_the_bit_and_the_others_move_in_the_step_only(method: str, x_y):
    x, y = x_y
    objective = bound(method)
    before = copy.deepcopy(objective.state_dict())
    x_adv = objective.perturb(x, y, Linf(), second=mirrored(objective, x))
    assert all(torch.equal(value, before[key]) for key, value in objective.state_dict().items())
    objective(x, x_adv, y, mirrored(objective, x))
    moved = {key for key, value in objective.state_dict().items() if not torch.equal(value, before[key])}
    learning = {"student", LEARNERS.get(method.partition("+")[2], "student")}
    assert {key.split(".")[1] for key in moved if key.startswith("nets.")} == (learning if method != "afa" else set())
    assert any(key.startswith("parts.") for key in moved) == bool(KEEPS_COUNT & {*method.split("+")})


def test_batchnorm_sees_clean_and_adversarial_images_once_each(x_y):
    x, y = x_y
    objective = bound("trades")
    objective(x, x.flip(0), y)
    assert isinstance(objective.student, TinyNet)
    norm = objective.student.layer1[1]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("method", every_part_quick(METHODS))
def test_forwards_of_a_step(method: str, x_y, monkeypatch: pytest.MonkeyPatch):
    x, y = x_y
    objective = bound(method)
    guests = {id(objective.nets[name].get_submodule("net")): name for name in objective.nets if name != "student"}
    count: Counter[str] = Counter()
    plain = TinyNet.forward

    def counted(self: TinyNet, x: torch.Tensor) -> torch.Tensor:
        count[guests.get(id(self), "student")] += 1
        return plain(self, x)

    objective.perturb(
        x, y, Linf(), second=mirrored(objective, x), steps=1
    )  # builds the folded copies, which traces forward
    guests |= {id(folded.twin.get_submodule("net")): name for name, folded in objective._twins.guests.items()}
    monkeypatch.setattr(TinyNet, "forward", counted)
    x_adv = objective.perturb(x, y, Linf(), second=mirrored(objective, x), steps=10)
    objective(x, x_adv, y, mirrored(objective, x))
    base, _, plugin = method.partition("+")
    added = GUESTS.get(plugin, set()) if plugin != "adaad" else set()  # it has no loss of its own
    expected = Counter(net for net, _ in GUESTS.get(base, set()) | added)
    expected.update(IN_THE_ATTACK.get(plugin if plugin == "adaad" else base, {}))
    expected["ema"] += plugin == "adr" and base in LABELS_IN_THE_ATTACK
    expected["student"] = FORWARDS[base] + (
        base in UNSEEN and plugin in ("vfd", "ar-at", "afa", "qub", "rpat", "dajat")
    )
    expected["student"] += plugin in ("part", "afa", "rpat", "igdm", "pgi")  # a map, another augmentation, a view
    assert count == expected


@pytest.mark.parametrize(
    ("method", "threat"),
    [
        (method, threat) if method in BASES else pytest.param(method, threat, marks=pytest.mark.slow)
        for method in ATTACKED
        for threat in (Linf(8 / 255), L2(0.5))
        if isinstance(threat, Linf) or not method.endswith("+part")  # which is defined for linf
    ],
)
def test_examples_are_inside_the_threat_model_and_leave_everything_as_it_was(method: str, threat: Threat, x_y):
    x, y = x_y
    objective = bound(method)
    before = x.clone()
    x_adv = objective.perturb(x, y, threat, second=mirrored(objective, x))
    assert torch.equal(x, before)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    clean = torch.cat([x, mirrored(objective, x)]) if objective.method.augmentations > 1 else x
    assert (threat.distance(x_adv, clean) <= threat.eps + 1e-6).all()
    assert (x_adv - clean).abs().amax() > 0
    assert all(p.grad is None for p in objective.parameters())
    assert objective.student.training
    frozen = objective.nets.keys() - {"student", *LEARNERS.values()}
    assert not any(objective.nets[guest].training for guest in frozen)


@pytest.mark.parametrize("method", ["at", "trades"])
def test_folded_attack_equals_the_plain_loop(method: str, x_y):
    """The examples of the fast path against the seven lines of the papers' code, in float64."""
    x, y = x_y[0].double(), x_y[1]
    objective = bound(method)
    objective.double()
    eps = 8 / 255
    torch.manual_seed(3)
    x_adv = objective.perturb(x, y, Linf(eps), steps=5)
    net = copy.deepcopy(objective.student).eval()
    torch.manual_seed(3)
    if method == "trades":
        plain = x + 0.001 * torch.randn_like(x)
    else:
        plain = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(5):
        plain = plain.detach().requires_grad_()
        z = net(plain)
        if method == "trades":
            loss = F.kl_div(z.log_softmax(1), net(x).softmax(1), reduction="sum")
        else:
            loss = F.cross_entropy(z, y, reduction="sum")
        (grad,) = torch.autograd.grad(loss, plain)
        plain = plain.detach() + eps / 4 * grad.sign()
        plain = torch.min(torch.max(plain, x - eps), x + eps).clamp(0, 1)
    torch.testing.assert_close(x_adv, plain, atol=1e-9, rtol=0)


def test_the_attack_follows_the_weights_as_they_learn(x_y):
    x, y = x_y
    objective = bound("at")
    objective.perturb(x, y, Linf())
    with torch.no_grad():
        for parameter in objective.student.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch.manual_seed(0)
    now = objective.perturb(x, y, Linf())
    torch.manual_seed(0)
    fresh = compose(parse("at"), student=copy.deepcopy(objective.student)).perturb(x, y, Linf())
    torch.testing.assert_close(now, fresh)


def test_train_mode_attack_moves_batchnorm_statistics_and_restores_the_mode(x_y):
    x, y = x_y
    objective = bound("at").eval()
    assert isinstance(objective.student, TinyNet)
    norm = objective.student.layer1[1]
    assert isinstance(norm, nn.BatchNorm2d)
    objective.perturb(x, y, Linf(), steps=10, mode="train")
    assert norm.num_batches_tracked == 10
    assert not objective.student.training
    assert all(p.requires_grad and p.grad is None for p in objective.student.parameters())


def test_train_mode_attack_keeps_the_modes_its_owner_has_set(x_y):
    """A BatchNorm that was put into eval mode stays there, and its statistics stay."""
    x, y = x_y
    objective = bound("at")
    assert isinstance(objective.student, TinyNet)
    fixed = objective.student.layer1[1].eval()
    before = copy.deepcopy(fixed.state_dict())
    objective.perturb(x, y, Linf(), mode="train")
    assert not fixed.training
    assert all(torch.equal(value, before[key]) for key, value in fixed.state_dict().items())


def test_modes_come_back_when_the_attack_fails(x_y):
    x, y = x_y
    objective = bound("at").eval()
    with pytest.raises(RuntimeError):
        objective.perturb(x[:, :2], y, Linf(), mode="train")
    assert not any(module.training for module in objective.student.modules())


def test_examples_can_be_made_inside_no_grad(x_y):
    x, y = x_y
    torch.manual_seed(0)
    outside = bound("trades").perturb(x, y, Linf())
    torch.manual_seed(0)
    objective = bound("trades")
    torch.manual_seed(0)
    with torch.no_grad():
        inside = objective.perturb(x, y, Linf())
    assert inside.shape == outside.shape
    assert (inside - x).abs().amax() > 0


def test_the_student_cannot_be_its_own_guest():
    net = tiny(0)
    with pytest.raises(UserError, match="its own guest"):
        compose(parse("trades+vfd"), student=net, vanilla=net)


def test_unknown_arguments_of_a_training_attack_are_refused(x_y):
    x, y = x_y
    wrongs: tuple[dict[str, Any], ...] = ({"mode": "Train"}, {"start": "unifrom"}, {"steps": 0})
    for wrong in wrongs:
        with pytest.raises(UserError):
            bound("trades").perturb(x, y, Linf(), **wrong)


def test_images_outside_the_unit_range_are_refused_in_training_too(x_y):
    x, y = x_y
    with pytest.raises(UserError, match=r"need \[0, 1\]"):
        bound("trades").perturb(2 * x, y, Linf())


def test_the_attack_compares_the_clean_logits_with_logits_of_the_same_path():
    """At the clean image itself KL is 0 and at its minimum; a target from fp32 beside logits from bf16 would differ."""
    torch.manual_seed(0)
    student = build("resnet18(width=8)", classes=10).eval()
    x = torch.rand(8, 3, 32, 32)
    folded = Folded(Tapped(student, ()))
    with torch.autocast("cpu", torch.bfloat16):
        attack_loss, moved = from_clean(folded, x), x.clone().requires_grad_()
        values = attack_loss.loss(attack_loss.network(moved), attack_loss.target)
        (grad,) = torch.autograd.grad(values.sum(), moved)
        away = (x + 4 / 255 * torch.randn_like(x)).requires_grad_()
        (usual,) = torch.autograd.grad(attack_loss.loss(attack_loss.network(away), attack_loss.target).sum(), away)
    assert float(values.detach().abs().max()) < 1e-6
    assert float(grad.norm()) < 1e-3 * float(usual.norm())
    mixed = attack_loss._replace(target=student(x).detach())  # the trap: a better target, and a worse attack
    with torch.autocast("cpu", torch.bfloat16):
        moved = x.clone().requires_grad_()
        (wrong,) = torch.autograd.grad(mixed.loss(mixed.network(moved), mixed.target).sum(), moved)
    assert float(wrong.norm()) > 1e-2 * float(usual.norm())
