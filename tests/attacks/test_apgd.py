"""Auto-PGD by hand, against its loop written out again without compaction, and against its authors' code."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.networks import Target, TinyNet, tiny
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import ATTACKS
from advalign.attacks.apgd import APGDCE, APGDDLR, APGDT, auto_pgd, checkpoints
from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import cross_entropy, dlr, margin, targeted_dlr
from advalign.errors import UserError
from advalign.threats import L2, Linf, Threat

APGD = {"apgd-ce": APGDCE, "apgd-dlr": APGDDLR, "apgd-t": APGDT}
THREATS = [Linf(0.1), L2(0.5)]


def sharp(classes: int = 4) -> TinyNet:
    """A net in double precision with every class near."""
    net = tiny(0, classes=classes).double().eval()
    with torch.no_grad():
        net.fc.bias.sub_(net(batch(64)[0].double()).mean(0))
    return net


def own_labels(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(1)


def fooled(net: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    return own_labels(net, x_adv) != y


class CudaGraphed(nn.Module):
    """A network that remembers what it is shown."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.detach().clone())
        return self.function(x)


def test_checkpoints_of_100_steps():
    # 22 % of the steps, then 3 % less each time, down to 6 %
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert checkpoints(10) == {2: 2, 3: 1, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1, 9: 1, 10: 1}
    assert checkpoints(1) == {1: 1}


def never_fooled(loss: Tensor) -> Tensor:
    """Two columns, the loss in the second, that never leave class 0."""
    return torch.stack((torch.full_like(loss, 99.0), loss), 1)


def second(outputs: Tensor, _: Tensor) -> Tensor:
    return outputs[:, 1]


def test_ten_steps_by_hand():
    """Two images of one pixel p, in sixteenths; the ball is [4, 12], the first step 8, both start at 12.

    The loss is a tent: -|p - 7|, and for the second image -(p - 10.5) on the right and -2 (10.5 - p) on the left.
    Checkpoints come after 2 steps (one rise or none is too few), then after each step. `back` is the best iterate.
    """
    tent = torch.tensor([7.0, 10.5]).double()
    left = torch.tensor([1.0, 2.0]).double()

    def tents(x: Tensor) -> Tensor:
        beyond = 16 * x.flatten() - tent
        return never_fooled(-torch.where(beyond > 0, beyond, -left * beyond))

    first = [
        12.0,
        4.0,  # 12 - 8, without momentum; loss -3
        8.0,  # 4 + .75 x 8 + .25 (4 - 12); loss -1, the only rise of 2: step 4, back to 8
        6.0,  # 8 + .75 (-4) + .25 (8 - 4); loss -1, no rise: step 2, back to 8
        6.5,  # 8 + .75 (-2) + .25 (8 - 8); loss -.5, a rise
        7.625,  # 6.5 + .75 x 2 + .25 (6.5 - 8); loss -.625: step 1, back to 6.5
        7.25,  # 6.5 + .75 x 1 + .25 (6.5 - 6.5); loss -.25, a rise
        6.6875,  # 7.25 + .75 (-1) + .25 (7.25 - 6.5); loss -.3125: step 1/2, back to 7.25
        6.875,  # 7.25 + .75 (-1/2) + 0; loss -.125, a rise
        7.15625,  # 6.875 + .75 / 2 + .25 (6.875 - 7.25); loss -.15625: step 1/4, back to 6.875
        7.0625,  # 6.875 + .75 / 4 + 0; loss -.0625, the best
    ]
    other = [
        12.0,  # loss -1.5
        4.0,
        8.0,  # loss -5, the only rise of 2: step 4, back to 12
        11.0,  # 12 + .75 (-4) + .25 (12 - 4); loss -.5, a rise
        7.75,  # 11 + .75 (-4) + .25 (11 - 12); loss -5.5: step 2, back to 11
        9.5,  # 11 + .75 (-2) + 0; loss -2, a rise; no better than before, but the last checkpoint halved
        10.625,  # 9.5 + .75 x 2 + .25 (9.5 - 11); loss -.125, a rise, the best
        9.40625,  # 10.625 + .75 (-2) + .25 (10.625 - 9.5); loss -2.1875: step 1, back to 10.625
        9.875,  # 10.625 + .75 (-1) + 0; loss -1.25, a rise
        10.4375,  # 9.875 + .75 + .25 (9.875 - 10.625); loss -.125, a rise, but no better twice: step 1/2, back
        10.4375,  # 10.625 + .75 (-1/2) + .25 (10.625 - 9.875)
    ]
    network, labels = CudaGraphed(tents), torch.zeros(2, dtype=torch.int64)
    x = torch.full((2, 1, 1, 1), 0.5, dtype=torch.double)
    torch.manual_seed(0)  # from the upper end, both
    result = auto_pgd(AttackLoss(network, second, labels), x, labels, Linf(0.25), steps=10)
    trace = 16 * torch.stack(network.seen).flatten(1)
    assert trace.T.tolist() == [first, other]
    assert (16 * result).flatten().tolist() == [7.0625, 10.625]


@pytest.mark.slow
def test_the_second_step_carries_a_quarter_of_the_first():
    """On a plane in L2: the direction is that of the slope, (.6, .8), and 2 eps is too long by far."""
    value_and_grad = torch.tensor([0.6, 0.8]).double()
    network = CudaGraphed(lambda x: never_fooled(-10 + (x.flatten(1) * value_and_grad).sum(1)))
    x, labels = torch.full((1, 1, 1, 2), 0.5, dtype=torch.double), torch.zeros(1, dtype=torch.int64)
    torch.manual_seed(0)
    auto_pgd(AttackLoss(network, second, labels), x, labels, L2(0.1), steps=10)  # the first checkpoint comes after two
    start, one, two = (seen.flatten() - 0.5 for seen in network.seen[:3])

    def inside(move: Tensor) -> Tensor:
        return move * min(1.0, 0.1 / move.norm().item())

    assert start.norm().item() == pytest.approx(0.1)  # on the sphere
    torch.testing.assert_close(one, inside(start + 0.2 * value_and_grad), atol=1e-6, rtol=0)
    ahead = inside(one + 0.2 * value_and_grad)
    torch.testing.assert_close(two, inside(one + 0.75 * (ahead - one) + 0.25 * (one - start)), atol=1e-6, rtol=0)


def test_an_linf_start_is_as_long_as_the_radius():
    network, labels = CudaGraphed(lambda x: never_fooled(x.flatten(1).sum(1))), torch.zeros(5, dtype=torch.int64)
    x = torch.full((5, 3, 4, 4), 0.5)
    auto_pgd(AttackLoss(network, second, labels), x, labels, Linf(0.1), steps=1)
    moves = (network.seen[0] - x).flatten(1)
    torch.testing.assert_close(moves.abs().amax(1), torch.full((5,), 0.1))
    assert moves.abs().mean() == pytest.approx(0.05, rel=0.1)


def plain(
    attack_loss: AttackLoss, x: Tensor, y: Tensor, threat: Threat, start: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of the paper for the whole batch to the end; the result, and the step at which each was fooled."""
    periods = checkpoints(steps)
    project = threat.ball(x)
    x_adv, before = start, start
    step_size = torch.full((len(x), 1, 1, 1), 2 * threat.eps, dtype=x.dtype)
    points: list[Tensor] = []
    grads: list[Tensor] = []
    losses: list[Tensor] = []
    at_best, wrong = torch.zeros(len(x), dtype=torch.int64), []
    best_then, halved = torch.zeros(len(x)), torch.ones(len(x), dtype=torch.bool)
    everyone = torch.arange(len(x))
    for step in range(steps + 1):
        point = x_adv.clone().requires_grad_()
        logits = attack_loss.network(point)
        loss = attack_loss.loss(logits, attack_loss.target)
        points.append(x_adv)
        grads.append(torch.autograd.grad(loss.sum(), point)[0])
        losses.append(loss.detach())
        wrong.append(logits.argmax(1) != y)
        at_best = torch.stack(losses).argmax(0)  # the first of equals
        grad = grads[-1]
        if step in periods:
            best = torch.stack(losses).amax(0)
            history = [*losses[step - periods[step] :]] if step > periods[step] else [0 * loss, *losses[1:]]
            rises = sum((after > earlier).int() for earlier, after in pairwise(history))
            halve = (rises <= 0.75 * periods[step]) | (~halved & (best <= best_then))
            halved, best_then = halve, best
            step_size = torch.where(halve.view(-1, 1, 1, 1), step_size / 2, step_size)
            x_adv = torch.where(halve.view(-1, 1, 1, 1), torch.stack(points)[at_best, everyone], x_adv)
            grad = torch.where(halve.view(-1, 1, 1, 1), torch.stack(grads)[at_best, everyone], grad)
        share = 0.75 if step else 1.0
        ahead = project(x_adv + step_size * threat.steepest(grad))
        moved = project(x_adv + share * (ahead - x_adv) + (1 - share) * (x_adv - before))
        x_adv, before = moved, x_adv
    when = torch.where(torch.stack(wrong).any(0), torch.stack(wrong).int().argmax(0), -1)
    chosen = torch.where(when < 0, at_best, when)
    return torch.stack(points)[chosen, everyone], when


@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.15)], ids=str)
@pytest.mark.parametrize("loss", [cross_entropy, dlr])
def test_dropping_fooled_images_changes_nothing_for_the_others(loss, threat: Threat):
    x, net = batch(96)[0].double(), sharp()
    y = own_labels(net, x)
    network = CudaGraphed(net)
    torch.manual_seed(1)
    result = auto_pgd(AttackLoss(network, loss, y), x, y, threat, steps=30)
    sizes = [len(seen) for seen in network.seen]
    expected, when = plain(AttackLoss(net, loss, y), x, y, threat, network.seen[0], steps=30)
    assert {int(step) for step in when} >= {-1, 1}
    assert (when > 1).any()
    assert sizes == [int(((when < 0) | (when >= step)).sum()) for step in range(31)]
    torch.testing.assert_close(result, expected, atol=1e-9, rtol=0)


def oracle() -> Any:
    pytest.importorskip("pyautoattack")
    from pyautoattack import autopgd_base

    return autopgd_base


def theirs(name: str, net: nn.Module, threat: Threat, seed: int, steps: int = 100) -> Any:
    given: dict[str, Any] = {"norm": type(threat).__name__, "eps": threat.eps, "seed": seed, "n_iter": steps}
    if name == "apgd-t":
        return oracle().APGDAttack_targeted(net, **given)
    return oracle().APGDAttack(net, loss=name.removeprefix("apgd-"), **given)


@pytest.fixture
def double() -> Iterator[None]:
    torch.set_default_dtype(torch.double)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.15)], ids=str)
@pytest.mark.parametrize(("name", "loss"), [("apgd-ce", cross_entropy), ("apgd-dlr", dlr)])
def test_iterates_are_those_of_the_authors_code(name: str, loss, threat: Threat):
    """From one random start, in double precision: the same verdicts, and the same best iterate where all fail."""
    x, net = batch(64)[0].double(), sharp()
    y = own_labels(net, x)
    attack = theirs(name, net, threat, seed=0)
    attack.init_hyperparam(x)
    torch.manual_seed(7)
    best, withstood, _, _ = attack.attack_single_run(x, y)
    torch.manual_seed(7)
    ours = auto_pgd(AttackLoss(net, loss, y), x, y, threat, steps=100)
    assert torch.equal(fooled(net, ours, y), ~withstood)
    assert 5 < withstood.sum() < 60
    torch.testing.assert_close(ours[withstood], best[withstood], atol=1e-5, rtol=0)


def broken(name: str, target: Target, threat: Threat, seeds: int, steps: int = 100) -> tuple[float, float]:
    """How many images our attack breaks and how many theirs does, on average over seeds."""
    counts = []
    for seed in range(seeds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of zero gradients
            their_adv = theirs(name, target.model, threat, seed, steps).perturb(target.x, target.y)
        torch.manual_seed(seed)
        our_adv = APGD[name](threat, steps=steps)(target.model, target.x, target.y)
        counts.append([int(fooled(target.model, adv, target.y).sum()) for adv in (our_adv, their_adv)])
    ours, their = torch.tensor(counts).double().mean(0).tolist()
    return ours, their


@pytest.mark.slow
@pytest.mark.parametrize(("name", "threat"), [("apgd-ce", Linf(0.2)), ("apgd-dlr", L2(0.7))])
def test_as_strong_as_the_authors_code(name: str, threat: Threat, target: Target):
    ours, their = broken(name, target, threat, seeds=2)
    assert abs(ours - their) <= 1
    assert 20 < ours < 180


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.2), L2(0.7)], ids=str)
def test_targeted_as_strong_as_the_authors_code(threat: Threat, target: Target):
    some = target._replace(x=target.x[:60], y=target.y[:60])
    ours, their = broken("apgd-t", some, threat, seeds=2, steps=20)
    assert abs(ours - their) <= 0.5
    assert ours > 5


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("threat", [Linf(0.2), Linf(0.15), L2(0.7), L2(1.0)], ids=str)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr", "apgd-t"])
def test_as_strong_as_the_authors_code_over_three_seeds(name: str, threat: Threat, target: Target):
    ours, their = broken(name, target, threat, seeds=3)
    assert abs(ours - their) <= 1


def linear_case(classes: int, threat: Threat) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model, images far from the walls, and which of them can be broken at all."""
    generator = torch.Generator().manual_seed(classes)
    linear = nn.Linear(12, classes).double()
    model = nn.Sequential(nn.Flatten(), linear)
    weight = torch.randn(classes, 12, generator=generator, dtype=torch.double)
    x = 0.3 + 0.4 * torch.rand(100, 3, 2, 2, generator=generator, dtype=torch.double)
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(-(x.flatten(1) @ weight.T).mean(0))
    y = own_labels(model, x)
    apart = weight[None] - weight[y][:, None]  # (N, K, D)
    gain = threat.eps * (apart.abs().sum(2) if isinstance(threat, Linf) else apart.norm(dim=2))
    with torch.no_grad():
        gap = model(x) - model(x).gather(1, y[:, None])
    return model, x, y, (gap + gain).scatter(1, y[:, None], -torch.inf).amax(1) > 0


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.1)], ids=str)
@pytest.mark.parametrize("classes", [2, *(pytest.param(many, marks=pytest.mark.slow) for many in (3, 4, 8))])
@pytest.mark.parametrize("name", APGD)
def test_any_number_of_classes(name: str, classes: int, threat: Threat):
    """Aimed at each class in turn, all that a linear model allows; the other losses may set out for a wrong one."""
    model, x, y, breakable = linear_case(classes, threat)
    assert 10 < breakable.sum() < 95
    torch.manual_seed(0)
    got = fooled(model, APGD[name](threat)(model, x, y), y)
    assert not (got & ~breakable).any()
    assert got.sum() >= (1 if name == "apgd-t" or classes == 2 else 0.85) * breakable.sum()


@pytest.mark.parametrize("name", APGD)
def test_only_images_that_are_still_right_are_attacked(name: str):
    x, net = batch(48)[0].double(), sharp()
    y = own_labels(net, x)
    y[:8] = (y[:8] + 1) % 4
    attack = APGD[name](Linf(0.02), steps=4, restarts=3)
    x_adv = attack(net, x, y)
    assert torch.equal(x_adv[:8], x[:8])
    assert (x_adv[8:] != x[8:]).flatten(1).any(1).all()
    network = CudaGraphed(net)
    everything = APGD[name](Linf(0.5), steps=4, restarts=3)(network, x[8:9], y[8:9])
    assert fooled(net, everything, y[8:9]).all()
    assert len(network.seen) < 10  # the other restarts and targets had nothing to do


@pytest.mark.parametrize("name", APGD)
def test_restarts_break_more(name: str):
    x, net = batch(192)[0].double(), sharp()
    y = own_labels(net, x)
    found = []
    for restarts in (1, 4):
        torch.manual_seed(0)
        found.append(fooled(net, APGD[name](Linf(0.015), steps=2, restarts=restarts)(net, x, y), y))
    assert found[1].sum() > found[0].sum() > 0


def test_targets_are_the_likeliest_wrong_classes():
    x, net = batch(6)[0].double(), sharp(8)
    y = own_labels(net, x)
    ranked = net(x).argsort(1, descending=True)
    for targets, tried in [(1, 1), (3, 3), (7, 7), (9, 7)]:
        aims = [
            attack_loss.target for attack_loss in APGDT(Linf(), targets=targets, restarts=2)._attack_losses(net, x, y)
        ]
        assert len(aims) == 2 * tried
        for position, pair in enumerate(aims[::2]):
            assert torch.equal(pair, torch.stack((y, ranked[:, position + 1]), 1))
    wrong = ranked[:, 1]  # a label that is not on top is no target either
    aims = [attack_loss.target[:, 1] for attack_loss in APGDT(Linf())._attack_losses(net, x, wrong)]
    assert torch.equal(torch.stack(aims, 1), ranked[:, [0, 2, 3, 4, 5, 6, 7]])


def test_dlr_by_hand():
    logits = torch.tensor([[2.0, 5.0, 1.0, 4.0, -7.0], [2.0, 5.0, 1.0, 4.0, -7.0]])
    y = torch.tensor([1, 2])
    torch.testing.assert_close(dlr(logits, y), torch.tensor([-1 / 3, 4 / 3]))  # over 5 - 2
    # over 5 - (2 + 1) / 2
    torch.testing.assert_close(targeted_dlr(logits, y, torch.tensor([3, 4])), torch.tensor([-1 / 3.5, -8 / 3.5]))
    torch.testing.assert_close(dlr(9 * logits + 5, y), dlr(logits, y))
    few = logits[:, :3]
    torch.testing.assert_close(dlr(few, y), torch.tensor([-3 / 4, 1.0]))
    torch.testing.assert_close(targeted_dlr(few, y, torch.tensor([0, 1])), torch.tensor([-3.0, 4.0]))
    torch.testing.assert_close(dlr(few[:, :2], torch.tensor([1, 0])), margin(few[:, :2], torch.tensor([1, 0])))
    level = torch.zeros(1, 5)
    assert dlr(level, y[:1]).item() == targeted_dlr(level, y[:1], y[1:]).item() == 0


@pytest.mark.slow
def test_mixed_precision_breaks_as_many(target: Target):
    counts = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            x_adv = APGDDLR(Linf(0.2), steps=50)(target.model, target.x, target.y)
        assert x_adv.dtype == torch.float32
        counts.append(int(fooled(target.model, x_adv, target.y).sum()))
    assert abs(counts[0] - counts[1]) <= 4


@pytest.mark.parametrize("name", APGD)
def test_spelling(name: str):
    assert ATTACKS[name] is APGD[name]
    assert str(APGD[name](Linf(), restarts=5)) == f"{name}(steps=100, restarts=5)"
    for field, value in [("steps", 0), ("restarts", 0), *([("targets", 0)] if name == "apgd-t" else [])]:
        with pytest.raises(UserError, match=f"{name}: {field}=0 must be at least 1"):
            APGD[name](Linf(), **{field: value})
    with pytest.raises(UserError, match="must be a whole number"):
        APGD[name](Linf(), steps=2.5)
