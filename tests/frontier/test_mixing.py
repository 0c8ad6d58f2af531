"""Mixes of two networks: what they give, what no accurate network can take from them, and which setting is chosen."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advalign import attacks, models
from advalign.attacks.losses import cross_entropy, probability_margin
from advalign.data import Images
from advalign.errors import UserError
from advalign.frontier.choose import Count, choose, front
from advalign.frontier.evidence import CLEAN, Evidence
from advalign.frontier.mixing import Mixing, threshold, weight_above
from advalign.frontier.nuts import MixedNuts
from advalign.models import Folded
from advalign.models.mix import Mix, mixed, standardised, transformed
from advalign.threats import Linf


class Linear(nn.Module):
    """Logits of two pixels."""

    def __init__(self, seed: int, scale: float = 5.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(scale * torch.randn(3, 2, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.T


H, G = Linear(0).eval(), Linear(1, 20.0).eval()
THREAT = Linf(0.05)


def points(n: int = 60) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 1, 1, 2, generator=torch.Generator().manual_seed(2))
    return x, H(x).argmax(1)


def ball(x: Tensor) -> Tensor:
    """A fine grid over the ball around each image, (M, N, 1, 1, 2)."""
    steps = torch.linspace(-THREAT.eps, THREAT.eps, 21)
    grid = torch.tensor(list(itertools.product(steps, steps))).view(-1, 1, 1, 1, 2)
    return (x + grid).clamp(0, 1)


def evidence(n: int = 60, *, attacked: bool = True) -> Evidence:
    x, y = points(n)
    made = Evidence(Images(x, y), THREAT, 16)
    if attacked:
        made.add("robust network", attacks.MinMargin(THREAT)(H, x, y))
        made.add("accurate network", attacks.PGD(THREAT, steps=10)(G, x, y))
    return made


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("transform", [(), (5.0, 4.0, -1.1)])
def test_a_mix_is_the_mean_of_probabilities(temperature: float, transform: tuple[float, ...]):
    x, _ = points()
    h, g = H(x).double(), G(x).double()
    expected = 0.3 * (g / temperature).softmax(1) + 0.7 * transformed(h, transform).softmax(1)
    torch.testing.assert_close(Mix(H, G, 0.7, temperature, transform)(x).exp(), expected, atol=1e-7, rtol=1e-6)


def test_of_a_hard_accurate_network_the_decision_counts_and_its_scale_changes_neither_value_nor_gradient():
    x, _ = points()
    expected = 0.3 * F.one_hot(G(x).argmax(1), 3) + 0.7 * H(x).double().softmax(1)
    torch.testing.assert_close(mixed(H(x), G(x), 0.7, 0.0).exp(), expected, atol=1e-7, rtol=1e-6)
    grads = []
    for scale in (1.0, 1000.0):
        leaf = x.clone().requires_grad_()
        mix = mixed(H(leaf), scale * G(leaf), 0.7, 0.0)
        torch.testing.assert_close(mix.exp(), expected, atol=1e-7, rtol=1e-6)
        grads.append(torch.autograd.grad(mix[:, 0].sum(), leaf)[0])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)
    assert (grads[0] != 0).all()


def test_sharp_settings_are_attacked_through_blunter_ones_as_well():
    dial = Mixing(H, G)
    assert [each.values["temperature"] for each in dial.surrogates(dial.setting(0.7, 0.1))] == [1.0, 5.0]
    assert [each.values["weight"] for each in dial.surrogates(dial.setting(0.7, 0.0))] == [0.7, 0.7]
    assert dial.surrogates(dial.setting(0.7, 1.0)) == []
    assert dial.surrogates(dial.robust) == dial.surrogates(dial.accurate) == []


def test_the_ends_are_the_networks_themselves_to_the_bit():
    x, _ = points()
    assert torch.equal(Mix(H, G, 1.0, 0.5, (5.0, 4.0, -1.1))(x), H(x))
    assert torch.equal(Mix(H, G, 0.0, 0.5)(x), G(x))


def test_nothing_saturates_where_both_are_sure():
    logits = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    mix = mixed(logits, logits.detach(), 0.9)
    assert mix.isfinite().all()
    (grad,) = torch.autograd.grad(cross_entropy(mix, torch.tensor([1])).sum(), logits)
    assert grad.isfinite().all()
    assert (grad != 0).any()


def test_a_network_mixed_with_itself_is_that_network():
    x, _ = points()
    torch.testing.assert_close(Mix(H, H, 0.4)(x).exp().float(), H(x).softmax(1), atol=1e-6, rtol=1e-5)


def test_the_transform_is_that_of_the_paper():
    z = torch.tensor([[3.0, -1.0, 0.5, 7.0]], dtype=torch.float64)
    u = (z - z.mean()) / math.sqrt(float(z.var()) + 1e-8)
    v = [0.5 * (t - 1.1) * (1 + math.erf((t - 1.1) / math.sqrt(2))) for t in u[0].tolist()]
    expected = [5 * math.copysign(abs(each) ** 4, each) for each in v]
    torch.testing.assert_close(transformed(z, (5.0, 4.0, -1.1))[0].tolist(), expected)
    many = torch.randn(2, 300, dtype=torch.float64)
    largest = many.sort(1, descending=True).values[:, :250]
    torch.testing.assert_close(standardised(many)[:, 0], (many[:, 0] - largest.mean(1)) / largest.std(1))


@pytest.mark.parametrize("weight", [0.7, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.55, 0.9))])
def test_no_network_can_take_what_the_floor_holds(weight: float):
    """The worst network in the accurate one's place is sure, at every point of the ball, of the runner-up."""
    x, y = points()
    held = Mixing(H, G).floor(Mixing(H, G).setting(weight, 1.0), evidence())
    for each in ball(x):
        h = H(each)
        runner_up = h.scatter(1, y[:, None], -torch.inf).argmax(1)
        worst = (1 - weight) * F.one_hot(runner_up, 3) + weight * h.double().softmax(1)
        assert (worst.argmax(1) == y)[held].all()
    assert 0 < held.sum() < len(y)


@pytest.mark.parametrize("weight", [0.7, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.55, 0.9))])
def test_what_the_floor_does_not_hold_some_network_can_take(weight: float):
    x, y = points()
    held = Mixing(H, G).floor(Mixing(H, G).setting(weight, 1.0), evidence())
    least = torch.stack([-probability_margin(H(each), y) for each in ball(x)]).amin(0)
    clear = (least - threshold(weight)).abs() > 1e-3  # the grid is not every point
    assert torch.equal(held[clear], (least > threshold(weight))[clear])


@pytest.mark.parametrize("temperature", [0.5, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.0, 3.0))])
def test_an_attack_on_the_mix_never_comes_below_the_floor_and_a_brute_force_not_below_the_attack(temperature: float):
    x, y = points()
    dial = Mixing(H, G)
    for weight in (0.6, 0.8, 0.95):
        setting = dial.setting(weight, temperature)
        net = dial.network(setting)
        attack = attacks.parse("worst(apgd-ce(steps=30), apgd-t(steps=30, targets=2))", threat=THREAT)
        withstood = net(attack(net, x, y)).argmax(1) == y
        truly = torch.stack([net(each).argmax(1) == y for each in ball(x)]).all(0) & (net(x).argmax(1) == y)
        assert (dial.floor(setting, evidence()) & ~withstood).sum() == 0
        assert (withstood & ~truly).sum() <= 1  # what a grid finds and the attack does not


def test_the_floor_rises_with_the_weight():
    dial, seen = Mixing(H, G), evidence()
    floors = [dial.floor(dial.setting(weight, 1.0), seen) for weight in (0.3, 0.6, 0.8, 0.9, 0.99)]
    assert all((low & ~high).sum() == 0 for low, high in itertools.pairwise([*floors, dial.floor(dial.robust, seen)]))
    assert not floors[0].any()


@pytest.mark.parametrize("margin", [1e-4, 0.0123456, 0.5, 0.9999, 1.0])
def test_a_weight_for_a_margin_just_suffices(margin: float):
    weight = weight_above(margin)
    assert threshold(weight) < margin
    assert threshold(weight - 2e-4) > margin or margin < 1e-3


def test_settings_go_from_the_accurate_to_the_robust_network_and_one_of_them_gives_no_more_than_allowed():
    dial, seen = Mixing(H, G), evidence()
    settings = dial.propose(seen, 7, give=5.0)
    assert settings[0] == dial.accurate
    assert settings[-1] == dial.robust
    floors = [int(dial.floor(each, seen).sum()) for each in settings]
    assert floors == sorted(floors)
    assert any(floors[-1] - 0.05 * len(seen) <= floor < floors[-1] for floor in floors[:-1])
    assert len(settings) <= 8


def test_sets_are_inside_the_threat_model_and_have_names_of_their_own():
    seen = evidence(attacked=False)
    with pytest.raises(UserError, match="outside Linf"):
        seen.add("far", (seen.sets[CLEAN] + 0.1).clamp(0, 1))
    seen.add("near", seen.sets[CLEAN])
    with pytest.raises(UserError, match="'near'"):
        seen.add("near", seen.sets[CLEAN])


def test_logits_are_asked_once_for_each_set():
    calls = []

    class Counted(Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return super().forward(x)

    seen, net = evidence(40), Counted(0).eval()
    dial = Mixing(net, G)
    for weight in (0.5, 0.7, 0.9):
        for name in seen.sets:
            dial.correct(dial.setting(weight, 1.0), seen, name)
    assert sum(calls) == 40 * len(seen.sets)


def test_mixednuts_finds_a_transform_that_keeps_no_more_wrong_decisions_than_any_other_of_its_grid():
    x, y = points()
    y = torch.where(torch.arange(len(y)) % 7 == 0, G(x).argmax(1), y)  # some that the robust network has wrong
    seen = Evidence(Images(x, y), THREAT, 16)
    seen.add("robust network", attacks.MinMargin(THREAT)(H, x, y))
    dial = MixedNuts(H, G)
    settings = dial.propose(seen, 5, give=5.0)
    assert dial.found is not None
    assert all(each.values["temperature"] == 0 for each in settings[1:-1])
    wrong = H(x).argmax(1) != y
    assert wrong.any()

    def kept(transform: tuple[float, float, float]) -> float:
        margins = dial.margins(seen, transform)
        q = margins[margins > 0].sort().values[int(0.05 * len(y))]
        p = transformed(H(x).double(), transform).softmax(1).topk(2).values
        return float(((p[:, 0] - p[:, 1])[wrong] >= q - 1e-4).double().mean())

    some = [(0.1, 2.0, -1.0), (1.0, 1.0, 0.0), (5.0, 4.0, -1.136364)]
    assert kept(dial.found.transform) <= min(map(kept, some)) + 1e-9
    assert not dial.found.useless


def test_mixednuts_says_where_no_transform_qualifies():
    dial, seen = MixedNuts(H, G), evidence()
    dial.propose(seen, 5, give=100.0)
    (line,) = dial.warnings(seen)
    assert "no transform of the grid qualifies" in line


def test_the_highest_clean_accuracy_within_what_may_be_given_is_chosen():
    counts = [Count(99, 10), Count(95, 49), Count(97, 50), Count(97, 51), Count(90, 52), Count(80, 51)]
    assert choose(counts, 100, 1.0) == 3  # of equal clean accuracy the more robust one
    assert choose(counts, 100, 2.0) == 3
    assert choose(counts, 100, 100.0) == 0
    assert choose(counts, 100, 0.0) == 3
    assert choose([Count(99, 40), Count(80, 51)], 100, 1.0) == 1  # the robust network always qualifies
    assert choose([Count(300, 147), Count(250, 150)], 300, 1.0) == 0  # exactly one point


def test_the_front_leaves_out_what_another_beats():
    counts = [Count(99, 10), Count(95, 9), Count(95, 30), Count(95, 29), Count(90, 50), Count(89, 50), Count(80, 60)]
    assert front(counts, 10) == [0, 2, 4, 6]
    assert front(counts, 2) == [0, 6]


def test_mixes_are_spelled_built_and_folded():
    spelling = 'mix(robust="small-cnn(width=4)", accurate="small-cnn(width=8)", weight=0.8, temperature=0.5)'
    net = models.build(spelling, classes=3, channels=1).eval()
    assert models.canonical(spelling.replace("width=4", "width = 4")) == spelling
    x = torch.rand(5, 1, 8, 8)
    folded = Folded(net)
    torch.testing.assert_close(folded(x), net(x), atol=1e-5, rtol=1e-4)
    assert folded.pairs  # BatchNorms of both


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("mix(robust=small-cnn, accurate=small-cnn, weight=1.5)", "weight=1.5 must be in"),
        ("mix(robust=small-cnn, accurate=small-cnn, weight=0.5, temperature=-1)", "temperature=-1 must be"),
        ("mix(robust=small-cnn, accurate=small-cnn, weight=0.5, transform=(1, 2))", "must be three numbers"),
        ("mix(robust=small-cnn, accurate=small-cnn, weight=0.5, transform=(0.0, 2, 1))", "scale=0 must be above 0"),
        ("mix(robust=small-cnn, weight=0.5)", "needs its accurate"),
        ("mix(robust=small-cnnn, accurate=small-cnn, weight=0.5)", "small-cnn"),
        ("normalized(model=small-cnn, mean=(0.5,), std=(0.2,))", "must have one value for each of 3"),
    ],
)
def test_what_is_no_mix_is_refused(spelling: str, words: str):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        models.build(spelling, classes=10, channels=3)
