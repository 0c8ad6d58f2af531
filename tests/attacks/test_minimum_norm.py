"""DDN and FMN: the least distance on linear models in every norm, Auto-PGD at three radii, and foolbox."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tests.attacks.linear_models import linear, most
from tests.networks import Around, Target, fooled, own_labels, sharp
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import APGDT, DDN, FMN
from advalign.attacks.pass_counter import PassCounter
from advalign.errors import UserError
from advalign.threats import L1, L2, Linf, PixelLinf, Threat, shortened


def reach(threat: Threat, x: Tensor, weight: Tensor, radii: Tensor) -> Tensor:
    """The most that <weight, z> can grow within radii (N,) and [0, 1]: by the conditions of Karush, Kuhn and Tucker."""
    flat, size = x.flatten(1), weight.abs()
    room = torch.where(weight > 0, 1 - flat, flat)
    if isinstance(threat, Linf):
        return (size * room.minimum(radii[:, None])).sum(1)
    if isinstance(threat, L1):
        return torch.cat([most(x[i : i + 1], weight[i : i + 1], float(radii[i])) for i in range(len(x))])
    low, high = torch.zeros(len(x), 1, dtype=x.dtype), torch.full((len(x), 1), 1e4, dtype=x.dtype)
    for _ in range(60):
        middle = (low + high) / 2
        long = (size * middle).minimum(room).norm(dim=1, keepdim=True) > radii[:, None]
        low, high = torch.where(long, low, middle), torch.where(long, middle, high)
    return (size * (size * low).minimum(room)).sum(1)


def least(threat: Threat, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The least distance (N,) at which a model of two classes can be fooled, by bisection."""
    weight = (model[1].weight[1] - model[1].weight[0]).detach() * (1 - 2 * y)[:, None]  # pyright: ignore[reportIndexIssue]
    with torch.no_grad():
        lead = model(x).gather(1, y[:, None]).squeeze(1) - model(x).gather(1, 1 - y[:, None]).squeeze(1)
    low, high = torch.zeros(len(x), dtype=x.dtype), torch.full((len(x),), 48.0, dtype=x.dtype)
    for _ in range(40):
        middle = (low + high) / 2
        enough = reach(threat, x, weight, middle) > lead
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


@pytest.mark.parametrize(
    ("attack", "excess"),
    [
        (FMN(Linf(1.0)), 0.01),
        (FMN(L2(1.0)), 0.01),
        pytest.param(FMN(L1(1.0)), 0.05, marks=pytest.mark.slow),
        (DDN(L2(1.0)), 0.01),
    ],
    ids=str,
)
def test_the_least_distance_on_a_linear_model_with_images_at_the_walls(attack: FMN | DDN, excess: float):
    model, x, y, _ = linear(2)
    x, y = x[:30], y[:30]
    x_adv = attack(model, x, y)
    assert fooled(model, x_adv, y).all()
    ratio = attack.threat.distance(x_adv, x) / least(attack.threat, model, x, y)
    assert ratio.min() > 1 - 1e-6
    assert ratio.max() < 1 + excess
    assert ratio.median() < 1.001


@pytest.mark.parametrize("threat", [Linf(1.0), L2(1.0), L1(1.0)], ids=str)
def test_a_ball_of_each_image_is_that_of_its_radius(threat: Linf | L2 | L1):
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    delta = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    radii = torch.tensor([0.0, 0.1, 0.5, 2.0, 50.0], dtype=torch.double)
    got = shortened(threat, delta, x, radii)
    for i, radius in enumerate(radii.tolist()):
        one = slice(i, i + 1)
        ball = type(threat)(min(radius, 1.0) if isinstance(threat, Linf) else radius).ball(x[one])
        torch.testing.assert_close(x[one] + got[one], ball(x[one] + delta[one]))


def test_misclassified_images_stay_and_what_cannot_be_fooled_is_the_clean_image():
    x = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(12, 2)
    model = nn.Sequential(nn.Flatten(), layer)
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, 0.0]))
    y = torch.tensor([0, 1, 0, 1])
    for attack in (FMN(Linf(0.1), steps=5), DDN(L2(0.5), steps=5)):
        assert torch.equal(attack(model, x, y), x)


@pytest.mark.parametrize(
    "attack",
    [
        FMN(Linf(1.0), 20),
        pytest.param(FMN(L2(1.0), 20), marks=pytest.mark.slow),
        pytest.param(FMN(L1(1.0), 20), marks=pytest.mark.slow),
        DDN(L2(1.0), 20),
    ],
    ids=str,
)
def test_the_nearest_adversary_fools_the_network_and_not_only_a_twin_with_a_nearer_boundary(attack: FMN | DDN):
    x, _ = batch(16)
    net = sharp()
    y = own_labels(net, x)
    counter = PassCounter(net)
    counter.net = Around(counter.net, after=lambda z: z - 1e-4 * nn.functional.one_hot(y, z.shape[1]))  # pyright: ignore[reportAttributeAccessIssue]
    nearest, alone = attack(counter, x, y), attack(net, x, y)
    assert fooled(net, nearest, y).equal(fooled(net, alone, y))
    ratio = attack.threat.distance(nearest, x) / attack.threat.distance(alone, x)
    assert ratio.nanmedian() < 1.01


def sure() -> tuple[nn.Module, Tensor, Tensor]:
    """A linear network whose softmax is exactly 1 at most images, so that the cross entropy has no gradient there."""
    generator = torch.Generator().manual_seed(0)
    layer, x = nn.Linear(48, 10), torch.rand(60, 3, 4, 4, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(500 * torch.randn(10, 48, generator=generator))
        layer.bias.copy_(-(x.flatten(1) @ layer.weight.T).mean(0))
    net = nn.Sequential(nn.Flatten(), layer)
    return net, x, own_labels(net, x)


def test_ddn_gets_away_from_where_the_cross_entropy_has_no_gradient():
    net, x, y = sure()
    probabilities = net(x).softmax(1).gather(1, y[:, None])
    assert (probabilities == 1).float().mean() > 0.9
    torch.manual_seed(0)
    nearest, by_margin = DDN(L2(1.0))(net, x, y), FMN(L2(1.0), 50)(net, x, y)
    assert fooled(net, nearest, y).all()
    distance = L2(1.0).distance
    assert distance(nearest, x).median() < 1.1 * distance(by_margin, x).median()


def test_luck_of_ddn_does_not_depend_on_whether_neighbours_have_a_gradient():
    net, x, y = sure()
    others = torch.where(torch.arange(60) % 2 == 0, (y + 1) % 10, y)  # every other one has a gradient from the start
    results = []
    for labels in (y, others):
        torch.manual_seed(0)
        results.append(DDN(L2(1.0), steps=10)(net, x, labels)[1::2])
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(1.0), L2(1.0), L1(1.0)], ids=str)
def test_what_fools_the_folded_twin_fools_the_network(threat: Threat):
    """At the boundary rounding decides, of a few in a thousand images."""
    torch.manual_seed(0)
    layers = [each for n in (3, 8) for each in (nn.Conv2d(n, 8, 3, 2, 1), nn.BatchNorm2d(8, momentum=None), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 10))
    net(torch.rand(256, 3, 8, 8))
    net, x = net.eval(), torch.rand(3000, 3, 8, 8)
    y = own_labels(net, x)
    attack = FMN(threat, steps=6)
    found, alone = (fooled(net, attack(each, x, y), y) for each in (PassCounter(net), net))
    assert torch.equal(found, alone)  # so few steps find none at all for an image in L1
    assert found.float().mean() > 0.999


def test_refusals():
    with pytest.raises(UserError, match="fmn minimises a norm"):
        FMN(PixelLinf(0.1, torch.zeros(1, 1, 2, 2)))
    with pytest.raises(UserError, match="gamma=1 must be between 0 and 1"):
        FMN(L2(0.5), gamma=1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "radii"),
    [(Linf, (0.1, 0.15, 0.2)), (L2, (0.3, 0.5, 0.7)), (L1, (0.5, 0.8, 1.2))],
    ids=["linf", "l2", "l1"],
)
def test_the_curve_agrees_with_auto_pgd_at_three_radii(make: Any, radii: tuple[float, ...], target: Target):
    model, x, y = target.model, target.x[:100], target.y[:100]
    nearest = FMN(make(1.0))(model, x, y)
    distance = make(1.0).distance(nearest, x).where(fooled(model, nearest, y), torch.inf)
    for eps in radii:
        torch.manual_seed(0)
        broken = int(fooled(model, APGDT(make(eps), steps=20, targets=4)(model, x, y), y).sum())
        assert 5 < broken < 95
        assert abs(int((distance <= eps).sum()) - broken) <= (14 if make is L1 else 6), (eps, broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "theirs"),
    [
        (FMN(Linf(1.0)), "LInfFMNAttack"),
        (FMN(L2(1.0)), "L2FMNAttack"),
        (FMN(L1(1.0)), "L1FMNAttack"),
        (DDN(L2(1.0)), "DDNAttack"),
    ],
    ids=str,
)
def test_as_near_as_foolbox(attack: FMN | DDN, theirs: str, target: Target):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foolbox = pytest.importorskip("foolbox")
        model = foolbox.PyTorchModel(target.model, bounds=(0, 1), device="cpu")
        x, y = target.x[:60], target.y[:60]
        reference = getattr(foolbox.attacks, theirs)(steps=attack.steps)(model, x, y, epsilons=None)[0]
    medians = []
    for x_adv in (attack(target.model, x, y), reference):
        broken = fooled(target.model, x_adv, y)
        medians.append(attack.threat.distance(x_adv, x).where(broken, torch.inf).median().item())
    assert medians[0] <= 1.02 * medians[1], medians
