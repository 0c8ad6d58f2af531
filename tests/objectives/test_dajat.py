"""DAJAT beside two plain networks that share their convolutions: one with the norms of each kind of augmentation.

Run beside the authors' code (train_DAJAT.py, utils_awp.py) on ResNet-18 in float64, three steps with attack, AWP and
update: with one copy, losses, weights and running statistics agree to 1e-14; with two, the losses and gradients of a
step do, and their auto norms see the passes in another order.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from tests.networks import tiny
from tests.objectives.short_training import begun
from tests.samples import batch
from torch import Tensor, nn

from advalign.errors import UserError
from advalign.models.augmentation_norm import with_augmentation_norms
from advalign.objectives import Objective, compose, parse, total
from advalign.objectives.distances import jensen_shannon
from advalign.threats import Linf

BETA, WEIGHT = 11.0, 2.0


def pair() -> tuple[nn.Module, nn.Module]:
    """Two networks that differ in their BatchNorms alone."""
    base = tiny(0).double().train()
    auto = copy.deepcopy(base)
    for module in auto.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            assert module.running_mean is not None
            module.running_mean.uniform_(-0.5, 0.5)
    return base, auto


def objective_of(method: str, base: nn.Module, auto: nn.Module) -> Objective:
    """Bind a method to a student with the norms of both."""
    objective = begun(compose(parse(method), student=copy.deepcopy(base)).train())
    state = objective.student.state_dict()
    others = {name: state[name.replace(".others.", ".first.")].clone() for name in state if ".others." in name}
    assert others
    for name in others:
        state[name] = auto.state_dict()[name.replace(".others.", ".")].clone()
    objective.student.load_state_dict(state)
    return objective


def trades(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of one augmentation, as in the authors' code, and the clean prediction."""
    z, z_adv = net(x), net(x_adv)
    kl = F.kl_div(F.log_softmax(z_adv, 1), F.softmax(z, 1), reduction="batchmean")
    return F.cross_entropy(z, y) + BETA * kl, F.softmax(z, 1)


def sample(copies: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    x, y = batch()
    views = [x.double(), *(x.flip(3 - k).double() ** (1.5 + k) for k in range(copies))]
    return views, [(view + 0.05 * torch.randn_like(view)).clamp(0, 1) for view in views], y


@pytest.mark.parametrize("copies", [1, 2])
def test_the_loss_and_its_gradient_are_the_papers(copies: int):
    base, auto = pair()
    views, views_adv, y = sample(copies)
    objective = objective_of(f"trades(beta=11)+dajat(copies={copies})", base, auto)
    found = total(objective(views[0], torch.cat(views_adv), y, torch.cat(views[1:])))
    found.backward()
    nets = [base, *[auto] * copies]
    parts = [trades(net, x, x_adv, y) for net, x, x_adv in zip(nets, views, views_adv, strict=True)]
    mixture = torch.clamp(torch.stack([p for _, p in parts]).mean(0), 1e-7, 1).log()
    js = torch.stack([F.kl_div(mixture, p, reduction="batchmean") for _, p in parts]).mean()
    expected = torch.stack([loss for loss, _ in parts]).mean() + WEIGHT * js
    expected.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    gradients = {name: p.grad for name, p in objective.student.named_parameters()}
    for (name, of_base), of_auto in zip(base.named_parameters(), auto.parameters(), strict=True):
        assert of_base.grad is not None
        assert of_auto.grad is not None
        if name in gradients:
            torch.testing.assert_close(gradients[name], of_base.grad + of_auto.grad, rtol=1e-10, atol=1e-12)
        else:
            norm, _, which = name.rpartition(".")
            torch.testing.assert_close(gradients[f"{norm}.first.{which}"], of_base.grad, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradients[f"{norm}.others.{which}"], of_auto.grad, rtol=1e-10, atol=1e-12)
    state = objective.student.state_dict()
    seen = [("first", base), *([("others", auto)] if copies == 1 else [])]  # with two, in another order: the page
    for kind, net in seen:
        for name, value in net.named_buffers():
            norm, _, which = name.rpartition(".")
            torch.testing.assert_close(state[f"{norm}.{kind}.{which}"], value, rtol=1e-12, atol=1e-12)


def test_each_augmentation_is_attacked_through_its_own_norms():
    base, auto = pair()
    views, _, y = sample(2)
    torch.manual_seed(0)
    x_adv = objective_of("trades+dajat", base, auto).perturb(views[0], y, Linf(), second=torch.cat(views[1:]), steps=3)
    torch.manual_seed(0)
    noise = (0.001 * torch.randn_like(torch.cat(views))).chunk(3)
    for k, (x, start) in enumerate(zip(views, noise, strict=True)):
        net = (base if k == 0 else auto).eval()
        moved = x + start
        for _ in range(3):
            moved.requires_grad_()
            kl = F.kl_div(F.log_softmax(net(moved), 1), F.softmax(net(x), 1), reduction="sum")
            moved = moved.detach() + 2 / 255 * torch.autograd.grad(kl, moved)[0].sign()
            moved = moved.clamp(x - 8 / 255, x + 8 / 255).clamp(0, 1)
        torch.testing.assert_close(x_adv.chunk(3)[k], moved, rtol=0, atol=1e-12)


def test_other_augmentations_leave_the_first_ones_norms_and_the_exported_network_as_they_were():
    base, auto = pair()
    views, views_adv, y = sample(1)
    objective = objective_of("trades+dajat(copies=1)", base, auto)
    objective(views[0], torch.cat(views_adv), y, views[1])
    exported = objective.exported_student().state_dict()
    assert exported.keys() == base.state_dict().keys()
    trades(base, views[0], views_adv[0], y)
    for name, value in base.state_dict().items():
        torch.testing.assert_close(exported[name], value, rtol=1e-12, atol=1e-12)
    x = views[0]
    torch.testing.assert_close(objective.eval().student(x), base.eval()(x), rtol=1e-12, atol=1e-12)


def test_perturbed_weights_climb_the_loss_on_the_first_augmentation_alone():
    base, auto = pair()
    views, views_adv, y = sample(2)
    objective = objective_of("trades(beta=11)+dajat", base, auto)
    found = total(objective.weights_terms(views[0], torch.cat(views_adv), y, torch.cat(views[1:])))
    assert found.item() == pytest.approx(trades(base, views[0], views_adv[0], y)[0].item(), rel=1e-12)
    consistent = compose(parse("at+consistency"), student=tiny(0)).train()  # of other methods, the whole loss
    whole = [
        total(step(views[0], torch.cat(views_adv[:2]), y, views[1])) for step in (consistent.weights_terms, consistent)
    ]
    assert whole[0].item() == pytest.approx(whole[1].item(), rel=1e-6)


def test_the_divergence_of_several_is_between_none_and_the_logarithm_of_their_number():
    p, *others = ((3 * torch.randn(50, 7, dtype=torch.double)).log_softmax(1) for _ in range(3))
    assert float(jensen_shannon(p, p, p)) == pytest.approx(0, abs=1e-12)
    assert 0 < float(jensen_shannon(p, *others)) < math.log(3)
    sure = (1e3 * torch.eye(7, dtype=torch.double)).log_softmax(1)
    apart = jensen_shannon(sure, sure.roll(1, 0), sure.roll(2, 0), least=1e-7)
    assert float(apart) == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize(
    ("spelled", "message"),
    [
        ("dajat(copies=0)", "copies=0 must be at least 1"),
        ("dajat(weight=-1)", "weight=-1 must be at least 0"),
        ("dajat(augment=autoargument)", "'autoargument': did you mean 'autoaugment'"),
    ],
)
def test_arguments_out_of_range_are_refused(spelled: str, message: str):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        parse(f"trades+{spelled}")


def test_missing_augmentations_and_networks_without_norms_are_refused():
    x, y = batch()
    objective = compose(parse("trades+dajat"), student=tiny(0)).train()
    with pytest.raises(UserError, match="give second="):
        objective.perturb(x, y, Linf())
    with pytest.raises(UserError, match="second= must hold 16 images, not 8"):
        objective.perturb(x, y, Linf(), second=x.flip(3))
    with pytest.raises(UserError, match="has no BatchNorm"):
        compose(parse("trades+dajat"), student=nn.Sequential(nn.Flatten(), nn.Linear(192, 4)))
    with pytest.raises(UserError, match="are doubled already"):
        with_augmentation_norms(objective.student)
