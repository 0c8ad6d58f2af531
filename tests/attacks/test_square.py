"""Square against its reference, pyautoattack, against the paper's proposals written out again, and its own promises."""

from __future__ import annotations

import math
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.networks import Target, tiny
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import Square
from advalign.attacks.square import _bumps, _eta, _squares, _stripes, _tiles
from advalign.errors import UserError
from advalign.threats import L2, Linf, PixelLinf, Threat

CPU = torch.device("cpu")


def reference(predict: Any, threat: Threat, queries: int, seed: int) -> Any:
    """The reference, its windows reaching the last row and column, which on 8 pixels is a matter of 20 images."""
    module = pytest.importorskip("pyautoattack.square")

    class Whole(module.SquareAttack):
        def random_int(self, low: int = 0, high: int = 1, shape: Any = (1,)) -> Tensor:
            return super().random_int(low, high + 1, shape)

    norm = "Linf" if isinstance(threat, Linf) else "L2"
    return Whole(predict, norm=norm, n_queries=queries - 1, eps=threat.eps, seed=seed, resc_schedule=False)


def broken(model: nn.Module, x_adv: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x_adv).argmax(1) != y).sum())


def compare(model: nn.Module, x: Tensor, y: Tensor, threat: Threat, queries: int, seeds: int) -> tuple[Tensor, Tensor]:
    """Images broken by ours and by the reference, by seed."""
    ours, theirs = [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        ours.append(broken(model, Square(threat, queries=queries)(model, x, y), y))
        theirs.append(broken(model, reference(model, threat, queries, seed).perturb(x, y), y))
    return torch.tensor(ours).double(), torch.tensor(theirs).double()


def assert_as_strong(ours: Tensor, theirs: Tensor) -> None:
    """Equal in the mean, to 1 image and three standard errors."""
    error = ((ours.var() + theirs.var()) / len(ours)).sqrt()
    assert abs(ours.mean() - theirs.mean()) <= 1 + 3 * error, (ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0)], ids=str)
def test_as_strong_as_the_reference(target: Target, threat: Threat):
    """Measured: 46.7 and 46.4 of 200 in Linf, standard deviation 2.5; 123.6 and 125.7 in L2, 4 (16 seeds each)."""
    assert_as_strong(*compare(*target, threat, queries=100, seeds=4))


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("threat", [Linf(0.2), Linf(0.15), L2(0.6), L2(1.0)], ids=str)
def test_as_strong_as_the_reference_with_many_queries(target: Target, threat: Threat):
    assert_as_strong(*compare(*target, threat, queries=800, seeds=6))


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("threat", [Linf(0.2), L2(2.0)], ids=str)
def test_as_strong_as_the_reference_on_larger_images(target: Target, threat: Threat):
    """16 pixels: the first grid of L2 then is the reference's, which leaves out pixels where there are 8."""
    model = nn.Sequential(nn.AvgPool2d(2), target.model)
    x = F.interpolate(target.x, scale_factor=2)
    assert_as_strong(*compare(model, x, target.y, threat, queries=200, seeds=8))


@pytest.mark.parametrize("side", [1, 2, 3, 4, 5, 6, 7, 9, 12, 29])
def test_bumps_are_the_references(side: int):
    theirs = reference(None, L2(1.0), 1, 0)
    theirs.device = CPU
    ours, lying = _eta(side, torch.float32, CPU)
    assert torch.equal(ours, lying.T)
    for bump in (theirs.eta(side) for _ in range(4)):
        assert min((bump - ours).abs().max(), (bump - lying).abs().max()) < 1e-6


def test_the_hill_of_three_by_hand():
    """One row of a hill (peak 1 + 1/4, slope 1/4) over two of a hollow, each half of the squared length."""
    third = torch.tensor([[0.25, 1.25, 0.25], [-0.25, -0.25, -0.25], [-0.25, -1.25, -0.25]])
    third[0] /= third[0].norm()
    third[1:] /= third[1:].norm()
    torch.testing.assert_close(_eta(3, torch.float32, CPU)[0], third / math.sqrt(2))


def test_the_schedule_by_hand():
    expected = {
        0: 0.8, 10: 0.8, 11: 0.4, 50: 0.4, 51: 0.2, 200: 0.2, 201: 0.1, 500: 0.1, 501: 0.05, 1000: 0.05,
        1001: 0.025, 2000: 0.025, 2001: 0.0125, 4000: 0.0125, 4001: 0.00625, 4999: 0.00625, 6000: 0.00625,
        6001: 0.003125, 8000: 0.003125, 8001: 0.0015625, 99999: 0.0015625,
    }  # fmt: skip
    for queries in (5000, 100):  # never rescaled
        assert {step: Square(Linf(), queries=queries).area(step) for step in expected} == pytest.approx(expected)
    assert Square(Linf(), p_init=0.3).area(60) == pytest.approx(0.075)


class PrecomputedExamples:
    """Draws that a test has written down, one image after the other, kept to be read again."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.generator, self.drawn = n, torch.Generator().manual_seed(seed), []

    def __call__(self, *shape: int) -> Tensor:
        self.drawn.append(torch.rand(self.n, *shape, generator=self.generator, dtype=torch.double))
        return self.drawn[-1]


def corner(drawn: list[Tensor], i: int, side: int, height: int, width: int) -> tuple[int, int]:
    return int(drawn[0][i] * (height - side + 1)), int(drawn[1][i] * (width - side + 1))


def images(seed: int = 0, n: int = 40) -> Tensor:
    x = torch.rand(n, 3, 9, 11, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    x[0] = x[0].round()
    return x


@pytest.mark.parametrize(("area", "side"), [(0.8, 9), (0.1, 3), (1e-4, 1)])
def test_squares_are_those_of_the_paper(area: float, side: int):
    x, eps, draw = images(), 0.1, PrecomputedExamples(40, 1)
    best = _stripes(x, eps, PrecomputedExamples(40, 0))
    found, place = _squares(x, best, eps, area, draw)
    corners = set()
    for i in range(len(x)):
        top, left = corner(draw.drawn, i, side, 9, 11)
        corners.add((top, left))
        assert (int(place.top[i]), int(place.left[i]), place.side) == (top, left, side)
        expected = best[i].clone()
        for c in range(3):
            sign = 1 if draw.drawn[2][i, c] < 0.5 else -1
            window = expected[c, top : top + side, left : left + side]
            window += 2 * eps * sign
        expected = torch.minimum(torch.maximum(expected, x[i] - eps), x[i] + eps).clamp(0, 1)
        inside = torch.zeros(9, 11, dtype=torch.bool)
        inside[top : top + side, left : left + side] = True
        torch.testing.assert_close(found[i], torch.where(inside, expected, best[i]), atol=1e-12, rtol=0)
    assert len(corners) == (3 if side == 9 else len(corners))
    if side == 3:
        assert {top for top, _ in corners} == set(range(7))  # the last row, too


@pytest.mark.parametrize(("area", "side"), [(0.8, 9), (0.1, 3), (1e-4, 3), (0.27, 5)])
def test_bumps_spend_the_length_of_two_windows_on_one(area: float, side: int):
    """Algorithm 3 of Andriushchenko et al. 2020, image by image and channel by channel."""
    x, eps, draw = images(), 1.5, PrecomputedExamples(40, 1)
    best = _tiles(x, eps, PrecomputedExamples(40, 0))
    found, _ = _bumps(x, best, eps, area, draw)
    for i, delta in enumerate(best - x):
        (r, s), (r2, s2) = (corner(draw.drawn[k:], i, side, 9, 11) for k in (0, 2))
        bump = _eta(side, torch.double, CPU)[0 if draw.drawn[4][i] >= 0.5 else 1]
        spare = max(eps**2 - float(delta.square().sum()), 0) / 3
        new = torch.zeros(3, side, side, dtype=torch.double)
        for c in range(3):
            sign = 1 if draw.drawn[5][i, c] < 0.5 else -1
            window = delta[c, r : r + side, s : s + side]
            new[c] = sign * bump + window / max(window.norm(), 1e-12)
            both = {(r + a, s + b) for a, b in product(range(side), repeat=2)}
            both |= {(r2 + a, s2 + b) for a, b in product(range(side), repeat=2)}
            spent = sum(float(delta[c, a, b]) ** 2 for a, b in both)
            new[c] *= math.sqrt(spare + spent) / new[c].norm()
        moved = delta.clone()
        moved[:, r2 : r2 + side, s2 : s2 + side] = 0
        moved[:, r : r + side, s : s + side] = new
        expected = (x[i] + eps * moved / moved.norm()).clamp(0, 1)
        torch.testing.assert_close(found[i], expected, atol=1e-9, rtol=0)


def test_it_starts_from_stripes_in_linf_and_from_a_grid_of_bumps_in_l2():
    x = torch.full((30, 3, 32, 32), 0.5)
    draw = PrecomputedExamples(30, 0)
    stripes = (_stripes(x, 0.1, draw) - x).float()
    assert torch.equal(stripes, stripes[:, :, :1].expand_as(stripes))
    torch.testing.assert_close(stripes.abs(), torch.full_like(x, 0.1))
    assert stripes[:, :, 0].sign().mean().abs() < 0.1
    tiles = (_tiles(x, 2.0, draw) - x).float()
    torch.testing.assert_close(tiles.flatten(1).norm(dim=1), torch.full((30,), 2.0))
    assert torch.equal(tiles.flatten(1) != 0, F.pad(torch.ones(30, 3, 30, 30), (1, 1, 1, 1)).flatten(1) != 0)
    cells = tiles[:, :, 1:31, 1:31].unfold(2, 6, 6).unfold(3, 6, 6)  # (30, 3, 5, 5, 6, 6)
    upright, lying = (bump * 2 / math.sqrt(75) for bump in _eta(6, torch.float32, CPU))
    kinds = [((cells - sign * bump).abs().amax((-1, -2)) < 1e-5) for bump in (upright, lying) for sign in (1, -1)]
    assert (torch.stack(kinds).sum(0) == 1).all()
    assert all(0.15 < kind.double().mean() < 0.35 for kind in kinds)
    assert torch.equal(kinds[0] | kinds[1], (kinds[0] | kinds[1])[:, :1].expand_as(kinds[0]))  # channels lie alike


def counted(model: nn.Module) -> list[int]:
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    return sizes


def test_queries_are_counted_with_the_start_and_fooled_images_leave():
    x, _ = batch(64)
    model = tiny(0).eval()
    with torch.no_grad():
        model.fc.bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    sizes = counted(model)
    torch.manual_seed(0)
    Square(Linf(0.02), queries=40)(model, x, y)
    assert len(sizes) == 40
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 64 > sizes[1] > sizes[-1] > 0
    sizes.clear()
    x_adv = Square(Linf(0.02), queries=40, restarts=3)(model, x, y)
    assert len(sizes) == 3 * 40 + 2  # and a look at who is left, before each restart
    sizes.clear()
    Square(L2(0.5), queries=9)(model, x, (y + 1) % 4)  # all wrong already: the start fools them, or nearly so
    assert sum(sizes) < 2 * 64
    assert 0 < broken(model, x_adv, y) < 64


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.3)], ids=str)
def test_the_margin_never_falls_and_more_queries_break_no_fewer(threat: Threat):
    x, _ = batch(48)
    model = tiny(0).eval()
    with torch.no_grad():
        model.fc.bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    values = []
    for queries in (1, 5, 30, 90):
        torch.manual_seed(3)
        with torch.no_grad():
            logits = model(Square(threat, queries=queries)(model, x, y))
        true = logits.gather(1, y[:, None]).squeeze(1)
        values.append(logits.masked_fill(F.one_hot(y, 4).bool(), -torch.inf).amax(1) - true)
    for fewer, more in pairwise(values):
        assert ((more >= fewer - 1e-6) | (more > 0)).all()
        assert ((more > 0) >= (fewer > 0)).all()
    assert (values[-1] > 0).sum() > (values[0] > 0).sum()


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.3)], ids=str)
def test_luck_does_not_depend_on_when_neighbours_are_fooled(threat: Threat):
    x, _ = batch(24)
    model = tiny(0).double().eval()
    x = x.double()
    with torch.no_grad():
        model.fc.bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    others = y.clone()
    others[::2] = (others[::2] + 1) % 4  # wrong, so that they leave at once
    results = []
    for labels in (y, others):
        torch.manual_seed(7)
        results.append(Square(threat, queries=60)(model, x, labels)[1::2])
    torch.testing.assert_close(*results, atol=1e-9, rtol=0)


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
@pytest.mark.parametrize("loss", ["margin", "ce"])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(1.0)], ids=str)
def test_any_number_of_classes(threat: Threat, loss: Any, classes: int):
    x, _ = batch(32)
    model = tiny(0, classes=classes).eval()
    with torch.no_grad():
        model.fc.bias.sub_(model(x).mean(0))
        y = model(x).argmax(1)
    torch.manual_seed(0)
    assert broken(model, Square(threat, queries=60, loss=loss)(model, x, y), y) > 16


@pytest.mark.parametrize("shape", [(3, 8, 12), (1, 13, 7), (2, 3, 3), (1, 1, 5), (3, 2, 2)])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.7), L2(0.0)], ids=str)
def test_any_shape_stays_inside(threat: Threat, shape: tuple[int, int, int]):
    x = torch.rand(5, *shape)
    x[0] = x[0].round()
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 3))
    with torch.no_grad():
        y = model(x).argmax(1)
    x_adv = Square(threat, queries=70)(model, x, y)
    assert x_adv.shape == x.shape
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert threat.distance(x_adv, x).max() <= threat.eps + 1e-6


def test_no_gradient_is_asked_for():
    class Opaque(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert not torch.is_grad_enabled()
            lit = torch.tensor((x.numpy().sum((1, 2, 3)) > 96).tolist())
            return torch.where(lit[:, None], torch.tensor([1.0, -1.0]), torch.tensor([-1.0, 1.0]))

    x = torch.full((4, 3, 8, 8), 0.49)
    x_adv = Square(Linf(0.1), queries=80)(Opaque(), x, torch.ones(4, dtype=torch.int64))
    assert (x_adv.sum((1, 2, 3)) > 96).all()


def test_another_threat_is_refused():
    with pytest.raises(UserError, match=r"square attacks in Linf, L2 and L1, not in PixelLinf"):
        Square(PixelLinf(0.1, torch.zeros(1, 3, 8, 8)))
