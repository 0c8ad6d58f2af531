"""Targeted attacks: each image is driven to the class that was asked for, and evaluations count those that arrive."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.networks import fooled, own_labels, sharp
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import FGSM, MIM, PGD, Attack, CarliniWagner, parse
from advalign.attacks.targets import check_class_order
from advalign.errors import UserError
from advalign.evaluation.accuracy import evaluate
from advalign.threats import Linf

THREAT = Linf(0.1)
SPELLINGS = ["fgsm", "pgd", "pgd(loss=margin)", "pgd(until_fooled=false)", "mim", "cw(c=30, steps=40, lr=0.1)"]


def targeted(spelling: str, target: int | str) -> Attack:
    name, _, arguments = spelling.partition("(")
    return parse(f"{name}(target={target}, {arguments or ')'}", threat=THREAT)


def driven_to(attack: Attack, net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    classes = attack.target_classes(net, x, y)
    assert classes is not None
    return classes


def sample(n: int = 24) -> tuple[nn.Module, Tensor, Tensor]:
    x, net = batch(n)[0], sharp()
    return net, x, own_labels(net, x)


@pytest.mark.parametrize("target", [2, *(pytest.param(other, marks=pytest.mark.slow) for other in (0, 1, 3))])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_images_enter_the_target_class_and_those_of_that_class_stay(spelling: str, target: int):
    net, x, y = sample()
    x_adv = targeted(spelling, target)(net, x, y)
    others = y != target
    assert torch.equal(x_adv[~others], x[~others])
    arrived = own_labels(net, x_adv)[others] == target
    untargeted = own_labels(net, parse(spelling, threat=THREAT)(net, x, y))[others] == target
    assert arrived.sum() > untargeted.sum()
    assert arrived.double().mean() > 0.4


@pytest.mark.parametrize("spelling", SPELLINGS[1:])
def test_with_two_classes_a_target_is_the_other_class(spelling: str):
    net, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)).double(), batch(12)
    x, y = x.double(), own_labels(net, x.double())
    torch.manual_seed(0)
    plain = parse(spelling, threat=Linf(0.05))(net, x, y)
    attack = targeted(spelling, "next").with_threat(Linf(0.05))
    torch.manual_seed(0)
    torch.testing.assert_close(attack(net, x, y), plain)
    assert fooled(net, plain, y).any()


def test_a_step_goes_down_the_cross_entropy_of_the_target():
    net, x, y = sample()
    targets = (y + 1) % 4
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(net(leaf), targets, reduction="sum"), leaf)
    expected = (x - THREAT.eps * grad.sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(THREAT, target="next")(net, x, y), expected)


def test_an_attack_goes_on_until_it_is_at_its_target():
    """An image that is merely misclassified is not done."""
    net, x, y = sample()
    target = 2
    wrong = (y != target) & (torch.arange(len(y)) % 2 == 0)
    labels = y.where(~wrong, (target + 1) % 4)  # misclassified from the start
    x_adv = PGD(THREAT, start="clean", restarts=2, target=target)(net, x, labels)
    assert (own_labels(net, x_adv)[wrong] == target).sum() > 2
    assert (x_adv[wrong] != x[wrong]).flatten(1).any(1).all()


def test_the_classes_that_words_stand_for():
    net, x, y = sample(400)
    with torch.no_grad():
        logits = net(x)
    for make in (FGSM, PGD, MIM, CarliniWagner):
        assert make(THREAT).target_classes(net, x, y) is None
        assert torch.equal(driven_to(make(THREAT, target=1), net, x, y), torch.ones_like(y))
        assert torch.equal(driven_to(make(THREAT, target="next"), net, x, y), (y + 1) % 4)
        least = [int(row.argsort()[0]) for row in logits]  # never the label, which is the largest here
        assert driven_to(make(THREAT, target="least-likely"), net, x, y).tolist() == least
        drawn = driven_to(make(THREAT, target="random"), net, x, y)
        assert ((drawn - y) % 4).bincount(minlength=4)[0] == 0
        assert ((drawn - y) % 4).bincount(minlength=4)[1:].min() > 100
    least_of_wrong = driven_to(PGD(THREAT, target="least-likely"), net, x, logits.argmin(1))
    assert torch.equal(least_of_wrong, logits.argsort(1)[:, 1])


@pytest.mark.parametrize("spelling", ["pgd(target=9)", "cw(target=4)", "fgsm(target=4)", "quantized(mim(target=4))"])
def test_a_class_that_the_model_has_not_is_refused(spelling: str):
    net, x, y = sample(4)
    with pytest.raises(UserError, match=r"target=\d must be one of the classes 0 to 3"):
        parse(spelling, threat=THREAT)(net, x.round(), y)


@pytest.mark.parametrize("spelling", ["pgd(target=0)", "cw(target=next)", "worst(fgsm, mim(target=1))"])
def test_a_surrogate_with_its_classes_in_another_order_is_refused(spelling: str):
    attack = parse(spelling, threat=THREAT)
    check_class_order([attack], ["cat", "dog"], ["cat", "dog"])
    with pytest.raises(UserError, match="aims at classes by their numbers"):
        check_class_order([FGSM(THREAT), attack], ["cat", "dog"], ["dog", "cat"])


@pytest.mark.parametrize("spelling", ["pgd", "pgd(target=random)", "cw(target=least-likely)"])
def test_targets_that_no_number_decides_need_no_order(spelling: str):
    check_class_order([parse(spelling, threat=THREAT)], ["cat", "dog"], ["dog", "cat"])


def test_evaluation_counts_those_that_arrive():
    net, x, y = sample(40)
    labels = y.where(torch.arange(40) % 8 > 0, (y + 1) % 4)  # some are misclassified, and not attacked
    attack = PGD(THREAT, steps=5, start="clean", target=1)
    evaluation = evaluate(net, (x, labels), [attack, FGSM(THREAT)], keep_examples=True)
    assert evaluation.success.keys() == {str(attack)}
    attacked = (y == labels) & (y != 1)
    predicted = own_labels(net, evaluation.examples[str(attack)])
    assert evaluation.success[str(attack)] == pytest.approx(float((predicted[attacked] == 1).double().mean()))
    assert evaluation.accuracies()[str(attack)] == float((predicted == labels).double().mean())
    assert evaluation.success[str(attack)] > 0.3


@pytest.mark.parametrize("spelling", ["pgd(target=random)", "quantized(pgd(target=random), bits=8)"])
def test_evaluation_knows_the_targets_that_an_attack_has_drawn(spelling: str):
    net, x, _ = sample(40)
    x = (x * 255).round() / 255
    y, attack = own_labels(net, x), parse(spelling, threat=THREAT)
    evaluation = evaluate(net, (x, y), attack, keep_examples=True, batch_size=16)
    assert evaluate(net, (x, y), attack, batch_size=16).success == evaluation.success
    predicted = own_labels(net, evaluation.examples[str(attack)])
    assert 0.5 < evaluation.success[str(attack)] <= float((predicted != y).double().mean())
