"""AFA: the contrast against a double loop, its attack, the probe, the two stages."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.networks import TinyNet, tiny
from tests.objectives.formulas import ce
from tests.samples import batch

import advalign as aa
from advalign.attacks import PGD
from advalign.errors import UserError
from advalign.objectives import Objective, compose, parse, total
from advalign.objectives.distances import supervised_contrast
from advalign.threats import Linf
from advalign.training.recipes import Recipe


def unit(net: TinyNet, x: torch.Tensor) -> np.ndarray:
    """Unit penultimate features of a tiny net in train mode."""
    net = copy.deepcopy(net).train()
    u = net.layer2(net.layer1(x)).mean((2, 3)).detach().numpy()
    return u / np.linalg.norm(u, axis=1, keepdims=True)


def l_afa(clean: np.ndarray, second: np.ndarray, adv: np.ndarray, labels: list[int], t: float) -> float:
    """methods.md, section 11: anchors are adversarial, A(i) are the clean views and the other adversarial ones."""
    n, losses = len(labels), []
    for i in range(n):
        members = [(u[j], labels[j]) for u in (clean, second) for j in range(n)]
        members += [(adv[j], labels[j]) for j in range(n) if j != i]
        below = sum(np.exp(adv[i] @ u / t) for u, _ in members)
        positives = [u for u, label in members if label == labels[i]]
        losses.append(-np.mean([np.log(np.exp(adv[i] @ u / t) / below) for u in positives]))
    return float(np.mean(losses))


@pytest.mark.parametrize(
    "method", ["contrast", "at+afa(weight=0.3)", "trades+afa(weight=0.3, temperature=0.2)", "hat+afa"]
)
def test_the_loss_is_the_double_loop(method: str):
    x, y = batch()
    x = x.double()
    second, x_adv = x.flip(3), (x + 0.03).clamp(0, 1)
    net, vanilla = tiny(0).double(), tiny(7).double()
    objective = Objective(parse(method), copy.deepcopy(net), {"vanilla": vanilla}).train()
    loss = total(objective(x, x_adv, y, second)).item()
    part = objective.method.parts[-1]
    weight = getattr(part, "weight", 1.0)
    contrast = l_afa(unit(net, x), unit(net, second), unit(net, x_adv), y.tolist(), vars(part)["temperature"])
    if method == "contrast":
        z = copy.deepcopy(net).train()(x).detach().numpy()
        rest = float(np.mean([ce(z[i], k) for i, k in enumerate(y.tolist())]))
    else:
        alone = Objective(parse(method.partition("+")[0]), copy.deepcopy(net), {"vanilla": vanilla}).train()
        rest = total(alone(x, x_adv, y)).item()
    assert loss == pytest.approx(rest + weight * contrast, rel=1e-9)


def test_every_feature_carries_gradient():
    def loss(anchors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        joint = torch.cat([others, anchors])
        return supervised_contrast(anchors, y, joint, torch.cat([y, y]), 0.5, left_out=torch.arange(4, 8)).mean()

    y = torch.tensor([0, 1, 0, 1])
    torch.manual_seed(0)
    anchors, others = (F.normalize(torch.randn(4, 3, dtype=torch.double)).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(loss, (anchors, others))


def test_the_attack_climbs_the_contrast_with_the_clean_features_of_both_views(x_y):
    """One step from x is eps times the sign of the gradient of that contrast, by plain autograd."""
    x, y = x_y
    second = x.flip(3)
    objective = compose(parse("contrast"), student=tiny(0)).train()
    objective.double()
    x, second = x.double(), second.double()
    x_adv = objective.perturb(x, y, Linf(0.01), second=second, steps=1, step_size=0.01, start="clean")
    net = copy.deepcopy(objective.student).eval()
    assert isinstance(net, TinyNet)

    def u(images):
        return F.normalize(net.layer2(net.layer1(images)).mean((2, 3)))

    with torch.no_grad():
        clean = torch.cat([u(x), u(second)])
    moved = x.clone().requires_grad_()
    similar = (u(moved) @ clean.T / 0.1).log_softmax(1)
    same = (y[:, None] == torch.cat([y, y])[None]).double()
    (grad,) = torch.autograd.grad(-(similar * same / same.sum(1, keepdim=True)).sum(), moved)
    torch.testing.assert_close(x_adv, (x + 0.01 * grad.sign()).clamp(0, 1), atol=1e-12, rtol=0)


def test_afa_may_take_the_attack_over(x_y):
    x, y = x_y
    nets = [tiny(0) for _ in range(3)]
    methods = ("contrast", "at+afa(attack=contrast)", "at+afa")
    made = []
    for method, net in zip(methods, nets, strict=True):
        torch.manual_seed(3)
        made.append(compose(parse(method), student=net).train().perturb(x, y, Linf(), second=x.flip(3)))
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_probe_teaches_no_feature_but_can_be_attacked(x_y):
    x, y = x_y
    objective = compose(parse("contrast"), student=tiny(0)).train()
    objective(x, x, y, x)["probe"].value.backward()
    reached = {name for name, p in objective.student.named_parameters() if p.grad is not None}
    assert reached == {"fc.weight", "fc.bias"}
    x_adv = PGD(Linf(0.1), steps=3, until_fooled=False)(objective.student.eval(), x, y)
    assert (F.cross_entropy(objective.student(x_adv), y) > F.cross_entropy(objective.student(x), y)).item()


def test_a_second_augmentation_is_asked_for(x_y):
    x, y = x_y
    objective = compose(parse("trades+afa"), student=tiny(0))
    for call in (lambda: objective.perturb(x, y, Linf()), lambda: objective(x, x, y)):
        with pytest.raises(UserError, match="second augmentation"):
            call()


def test_the_linear_stage_moves_nothing_but_the_last_layer(x_y):
    x, y = x_y
    extractor = tiny(3)
    objective = Objective(parse("afa"), tiny(0), {"extractor": extractor}).train()
    for _ in range(3):
        total(objective(x, x, y)).backward()
        with torch.no_grad():
            for p in objective.parameters():
                if p.grad is not None:
                    p.sub_(0.5 * p.grad)
    learnt, given = objective.exported_student().state_dict(), extractor.state_dict()
    assert list(learnt) == list(given)
    assert {key for key in given if not torch.equal(learnt[key], given[key])} == {"fc.weight", "fc.bias"}


def test_afa_trains_its_extractor_first_and_shares_it(tmp_path: Path):
    recipe = Recipe(epochs=1, batch_size=64, subset=256, validation=64, steps=2, eps=0.1, augment="none")
    run = aa.train("afa", data="digits", model="small-cnn(width=4)", recipe=recipe, runs=tmp_path)
    assert run.finished
    assert sorted(str(aa_run.name).split("-")[0] for aa_run in tmp_path.iterdir()) == ["afa", "contrast"]
    net = aa.load(run.path)
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_nothing_joins_a_stage():
    with pytest.raises(UserError, match="trains the last layer alone, so no plug-in joins it"):
        parse("afa+vfd")
    with pytest.raises(UserError, match="first stage of afa"):
        parse("contrast+afa")


@pytest.mark.parametrize("method", ["contrast", "afa"])
def test_the_restored_network_learns_as_any_other(method: str, x_y):
    x, y = x_y
    objective = Objective(parse(method), tiny(0), {"extractor": tiny(3)}).train()
    total(objective(x, x, y, x)).backward()
    again = compose(parse("at"), student=objective.exported_student()).train()
    total(again(x, x, y)).backward()
    assert all(p.grad is not None for p in again.student.parameters())
    objective(x, x, y, x)[
        "probe" if method == "contrast" else "clean"
    ].value.backward()  # and the first goes on as it was
    assert objective.student.training == (method == "contrast")


def test_the_contrast_is_not_rounded_by_autocast():
    torch.manual_seed(0)
    u, y = F.normalize(torch.randn(8, 16)), torch.arange(8) % 3
    exact = supervised_contrast(u, y, u, y, 0.1, left_out=torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(supervised_contrast(u, y, u, y, 0.1, left_out=torch.arange(8)), exact)
