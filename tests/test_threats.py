"""Balls, projections and samples: against brute force, closed forms and the distributions they promise."""

from __future__ import annotations

import math
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from advalign import threats
from advalign.attacks import parse
from advalign.errors import UserError
from advalign.runs.formats import Card
from advalign.threats import (
    L1,
    L2,
    Linf,
    Norm,
    PixelLinf,
    Threat,
    ascent_step,
    check_images,
    make_threat,
    parse_threat,
    require_inside,
)
from advalign.training.recipes import Recipe

THREATS = [Linf(0.1), L2(0.5), L1(2.0), Linf(0.0), L2(0.0), L1(0.0), Linf(1.0), L2(9.0), L1(99.0)]


def images(n: int, shape: tuple[int, ...] = (3, 4, 4), seed: int = 0) -> Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def norms(delta: Tensor, threat: Threat) -> Tensor:
    flat = delta.flatten(1)
    if isinstance(threat, L1):
        return flat.abs().sum(1)
    return flat.abs().amax(1) if isinstance(threat, Linf) else flat.square().sum(1).sqrt()


def test_the_norms_that_types_name_are_those_of_the_registry():
    names = set(threats.THREATS)
    assert {name: threat.norm for name, threat in threats.THREATS.items()} == {name: name for name in names}
    for hint in (Norm, get_type_hints(Recipe)["norm"], get_type_hints(Card)["norm"]):
        assert set(get_args(hint)) == names


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_projection_is_inside_and_idempotent_and_leaves_what_is_inside(threat: Threat):
    x = images(50)
    far = x + 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    project = threat.ball(x)
    once = project(far.clone())
    assert once.min() >= 0
    assert once.max() <= 1
    assert (norms(once - x, threat) <= threat.eps + 1e-12).all()
    torch.testing.assert_close(project(once.clone()), once, atol=1e-12, rtol=0)
    within = x + (once - x) / 2
    torch.testing.assert_close(project(within.clone()), within, atol=1e-12, rtol=0)


@pytest.mark.parametrize("threat", [Linf(0.3), L2(0.3), L1(0.3)], ids=str)
def test_projection_is_the_closest_point(threat: Threat):
    """Against a fine polar grid of the whole ball in two dimensions, away from the walls."""
    x = torch.full((6, 1, 1, 2), 0.5, dtype=torch.double)
    far = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.double)
    angle, share = torch.meshgrid(
        torch.linspace(0, 2 * math.pi, 3001, dtype=torch.double), torch.linspace(0, 1, 61).double(), indexing="ij"
    )
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    edge = circle / norms(circle.flatten(0, 1), threat).view_as(circle[..., :1])
    ball = 0.5 + 0.3 * (edge * share[..., None]).flatten(0, 1)
    closest = torch.stack([ball[(ball - point).square().sum(1).argmin()] for point in far.flatten(1)])
    torch.testing.assert_close(threat.ball(x)(far.clone()).flatten(1), closest, atol=2e-3, rtol=0)


def test_linf_projection_with_the_box_is_the_closest_point():
    x = images(4, (1, 2, 2)).round()  # at the walls
    far = x + torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    candidates = torch.linspace(0, 1, 100_001, dtype=torch.double)
    closest = [
        allowed[(allowed - f).abs().argmin()]
        for v, f in zip(x.flatten(), far.flatten(), strict=True)
        for allowed in [candidates[(candidates - v).abs() <= 0.2 + 1e-9]]
    ]
    torch.testing.assert_close(Linf(0.2).ball(x)(far.clone()).flatten(), torch.stack(closest), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float, torch.double], ids=str)
def test_l1_projection_with_the_box_by_bisection(dtype: torch.dtype):
    """Croce and Hein 2021: every entry is shortened by one length, and no further than to its wall."""
    for eps, scale in [(0.5, 0.3), (3.0, 1.0), (12.0, 0.1), (12.0, 30.0), (100.0, 5.0)]:
        x = images(60, (3, 6, 6), seed=7).to(dtype)
        x[:20] = x[:20].round()
        far = x + scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(8), dtype=dtype)
        far[5:10] = torch.where(images(5, (3, 6, 6)) < 0.8, x[5:10], far[5:10])  # most entries as they were
        delta, wall = (far - x).double(), torch.where(far > x, 1 - x, x).double()
        low, high = torch.zeros(60, 1, 1, 1), delta.abs().amax((1, 2, 3), keepdim=True)
        for _ in range(80):
            middle = (low + high) / 2
            long = (delta.abs() - middle).clamp(min=0).minimum(wall).sum((1, 2, 3), keepdim=True) > eps
            low, high = torch.where(long, middle, low), torch.where(long, high, middle)
        inside = delta.abs().minimum(wall).sum((1, 2, 3), keepdim=True) <= eps
        shortened = (delta.abs() - torch.where(inside, 0, high)).clamp(min=0).minimum(wall)
        found = L1(eps).ball(x)(far.clone()).double() - x.double()
        rounding = 1e-11 if dtype == torch.double else 2e-7 * max(scale, 3)
        torch.testing.assert_close(found, shortened * delta.sign(), atol=rounding, rtol=0)
        assert ((shortened > 1e-6) == (found != 0)).double().mean() > 0.999  # what is not moved is so to the bit


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_projection_and_sample_leave_the_centre_alone(threat: Threat):
    x = images(5)
    before = x.clone()
    threat.ball(x)(x.clone() + 1)
    threat.sample(x)
    threat.steepest(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_samples_are_inside(threat: Threat):
    x = images(200)
    x[:50] = x[:50].round()
    drawn = threat.sample(x)
    assert drawn.shape == x.shape
    assert drawn.dtype == x.dtype
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert (norms(drawn - x, threat) <= threat.eps + 1e-12).all()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_a_draw_that_is_not_clamped_leaves_the_ball_nowhere_and_is_the_sample_once_it_is(threat: Threat):
    x = images(60).round()
    torch.manual_seed(0)
    drawn = threat.draw(x)
    torch.manual_seed(0)
    assert torch.equal(threat.sample(x), drawn.clamp(0, 1))
    assert (norms(drawn - x, threat) <= threat.eps + 1e-12).all()
    assert threat.eps == 0 or (drawn.min() < 0 and drawn.max() > 1)


def test_linf_samples_are_uniform():
    torch.manual_seed(0)
    moved = (Linf(0.2).sample(torch.full((1000, 1, 4, 4), 0.5)) - 0.5).flatten()
    shares = torch.linspace(0.05, 0.95, 19)
    torch.testing.assert_close(moved.quantile(shares), 0.4 * shares - 0.2, atol=0.01, rtol=0)


def test_a_box_of_pixels_is_linf_where_its_radii_are_the_same():
    x, far = images(5), 3 * images(5, seed=1) - 1
    box = PixelLinf(0.2, torch.full_like(x, 0.2))
    assert torch.equal(box.ball(x)(far.clone()), Linf(0.2).ball(x)(far.clone()))
    assert torch.equal(box.steepest(far), Linf(0.2).steepest(far))
    assert torch.equal(box.distance(far, x), Linf(0.2).distance(far, x))
    torch.manual_seed(0)
    drawn = box.sample(x)
    torch.manual_seed(0)
    torch.testing.assert_close(drawn, Linf(0.2).sample(x))


def test_a_box_of_pixels_by_brute_force():
    x, far = images(4), 3 * images(4, seed=1) - 1
    radii = 0.3 * images(4, seed=2)
    radii[0] = 0
    before = x.clone(), radii.clone()
    box = PixelLinf(0.3, radii)
    projected, drawn = box.ball(x)(far.clone()).flatten(), box.sample(x).flatten()
    for i, (v, f, r) in enumerate(zip(*(each.flatten().tolist() for each in (x, far, radii)), strict=True)):
        low, high = max(v - r, 0.0), min(v + r, 1.0)
        assert projected[i].item() == pytest.approx(min(max(f, low), high), abs=1e-15)
        assert low - 1e-15 <= drawn[i].item() <= high + 1e-15
    assert torch.equal(drawn.view_as(x)[0], x[0])
    assert (Linf(0.3).distance(drawn.view_as(x), x) <= 0.3).all()
    assert torch.equal(x, before[0])
    assert torch.equal(radii, before[1])


def test_samples_of_a_box_of_pixels_are_uniform():
    torch.manual_seed(0)
    x = torch.full((4000, 1, 1, 2), 0.5)
    radii = torch.tensor([0.1, 0.4]).expand_as(x)
    moved = (PixelLinf(0.4, radii).sample(x) - 0.5) / radii
    shares = torch.linspace(0.05, 0.95, 19)
    for pixel in moved.flatten(1).T:
        torch.testing.assert_close(pixel.quantile(shares), 2 * shares - 1, atol=0.05, rtol=0)


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 2, 2)])
def test_l2_samples_fill_the_ball_evenly(shape: tuple[int, ...]):
    """In d dimensions a share s^d of an even ball lies within the radius s, and no direction is preferred."""
    torch.manual_seed(0)
    moved = (L2(0.4).sample(torch.full((16_000, *shape), 0.5)) - 0.5).flatten(1) / 0.4
    radius, dimensions = moved.norm(dim=1), moved.shape[1]
    for share in (0.3, 0.5, 0.7, 0.9):
        assert (radius <= share).double().mean().item() == pytest.approx(share**dimensions, abs=0.015)
    torch.testing.assert_close(moved.mean(0), torch.zeros(dimensions), atol=0.02, rtol=0)
    variance = 1 / (dimensions + 2)
    torch.testing.assert_close(moved.T @ moved / len(moved), variance * torch.eye(dimensions), atol=0.02, rtol=0)


def test_l1_samples_fill_the_ball_evenly():
    torch.manual_seed(0)
    moved = (L1(0.4).sample(torch.full((16_000, 1, 1, 3), 0.5)) - 0.5).flatten(1) / 0.4
    for share in (0.3, 0.5, 0.7, 0.9):
        assert (moved.abs().sum(1) <= share).double().mean().item() == pytest.approx(share**3, abs=0.015)
    octants = (moved > 0).long() @ torch.tensor([1, 2, 4])
    torch.testing.assert_close(octants.bincount() / 16_000, torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    shares = moved[:, 0].abs() / moved.abs().sum(1)  # of the simplex: Beta(1, 2)
    for share in (0.1, 0.3, 0.6):
        assert (shares <= share).double().mean().item() == pytest.approx(1 - (1 - share) ** 2, abs=0.015)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)], ids=str)
def test_samples_follow_the_seed(threat: Threat):
    x = images(3)
    torch.manual_seed(7)
    first, second = threat.sample(x), threat.sample(x)
    torch.manual_seed(7)
    assert torch.equal(threat.sample(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5), L1(2.0)], ids=str)
def test_an_empty_batch_has_samples_and_projections(threat: Threat):
    empty = torch.empty(0, 3, 4, 4)
    assert threat.sample(empty).shape == empty.shape
    assert threat.ball(empty)(empty.clone()).shape == empty.shape
    check_images(empty)


@settings(deadline=None)
@given(exponent=st.floats(-36, 36), seed=st.integers(0, 99))
def test_steepest_is_a_unit_step_that_gains_most(exponent: float, seed: int):
    """By Hölder, no step of length 1 gains more than the dual norm of the gradient, at any scale of fp32."""
    grad = torch.randn(3, 1, 2, 3, generator=torch.Generator().manual_seed(seed))
    scaled = grad * 10**exponent
    duals = (
        (Linf(), grad.abs().flatten(1).sum(1)),
        (L2(), grad.flatten(1).norm(dim=1)),
        (L1(), grad.abs().amax((1, 2, 3))),
    )
    for threat, dual in duals:
        step = threat.steepest(scaled)
        torch.testing.assert_close(norms(step, threat), torch.ones(3))
        torch.testing.assert_close((step * grad).flatten(1).sum(1), dual)


def test_a_step_of_an_attack_is_the_steepest_but_in_l1_a_twentieth_of_the_entries():
    grad = torch.randn(4, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    for threat in (Linf(), L2()):
        assert torch.equal(ascent_step(threat, grad), threat.steepest(grad))
    step = ascent_step(L1(), grad).flatten(1)
    largest = grad.flatten(1).abs().topk(15).indices
    expected = torch.zeros_like(step).scatter(1, largest, grad.flatten(1).gather(1, largest).sign() / 15)
    torch.testing.assert_close(step, expected)


@pytest.mark.parametrize("threat", [Linf(), L2(), L1()], ids=str)
def test_steepest_of_a_zero_gradient_is_no_step(threat: Threat):
    assert torch.equal(threat.steepest(torch.zeros(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))
    assert torch.equal(ascent_step(threat, torch.zeros(2, 3, 4, 4)), torch.zeros(2, 3, 4, 4))


def test_distance_by_hand():
    x = torch.zeros(2, 1, 1, 2)
    moved = torch.tensor([[[[0.3, -0.4]]], [[[0.0, 0.1]]]])
    torch.testing.assert_close(L2().distance(moved, x), torch.tensor([0.5, 0.1]))
    torch.testing.assert_close(Linf().distance(moved, x), torch.tensor([0.4, 0.1]))
    torch.testing.assert_close(L1().distance(moved, x), torch.tensor([0.7, 0.1]))


@pytest.mark.parametrize(
    ("threat", "spelling"),
    [
        (Linf(), "Linf(8/255)"),
        (Linf(0.031), "Linf(0.031)"),
        (Linf(0), "Linf(0)"),
        (L2(), "L2(0.5)"),
        (L2(128 / 255), "L2(128/255)"),
        (L2(3.0), "L2(3)"),
        (L1(), "L1(12)"),
        (PixelLinf(8 / 255, torch.zeros(1, 1, 1, 1)), "PixelLinf(8/255)"),
    ],
)
def test_spelling(threat: Threat, spelling: str):
    assert str(threat) == spelling


def test_threat_by_name():
    assert make_threat("linf", 0.1) == Linf(0.1)
    assert make_threat("l2", 0.1) == L2(0.1)
    assert make_threat("l1", 0.1) == L1(0.1)
    assert parse_threat(str(L1(2.5))) == L1(2.5)


@pytest.mark.parametrize(
    ("norm", "eps", "words"),
    [
        ("linf", 8.0, "eps=8 must be in [0, 1]; for images in [0, 1] write 8/255"),
        ("linf", -0.1, "eps=-0.1 must be in [0, 1]"),
        ("linf", 1000.0, "eps=1000 must be in [0, 1]"),
        ("linf", math.nan, "eps=nan"),
        ("l2", -0.5, "eps=-0.5 must be at least 0"),
        ("l2", math.inf, "eps=inf must be at least 0 and finite"),
        ("l2", math.nan, "eps=nan"),
        ("l1", -1.0, "l1: eps=-1 must be at least 0 and finite"),
        ("linff", 0.1, "unknown norm 'linff': did you mean 'linf'? choose from l1, l2, linf"),
    ],
)
def test_refusals_name_the_value_and_what_is_allowed(norm: str, eps: float, words: str):
    with pytest.raises(UserError) as caught:
        make_threat(norm, eps)
    assert words in str(caught.value)


def test_only_a_radius_of_pixel_values_is_told_to_divide():
    for eps in (-8.0, 1000.0):
        with pytest.raises(UserError) as caught:
            Linf(eps)
        assert "/255" not in str(caught.value)


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(-0.1, 1.0, "[-0.1, 1]"), (0.0, 1.01, "[0, 1.01]"), (-2.12, 2.64, "[-2.12, 2.64]")]
)
def test_normalised_images_are_refused_with_their_range(low: float, high: float, shown: str):
    with pytest.raises(UserError) as caught:
        check_images(torch.linspace(low, high, 48).view(1, 3, 4, 4))
    assert shown in str(caught.value)
    assert "Normalized" in str(caught.value)
    check_images(torch.linspace(0, 1, 48).view(1, 3, 4, 4))


@pytest.mark.parametrize("eps", [3.0, 12.0])
@pytest.mark.parametrize("attack", ["square(queries=3)", "pgd(steps=2)", "fgsm", "apgd-ce(steps=2)"])
def test_large_images_stay_in_the_l2_ball_by_double_precision(attack: str, eps: float):
    """224 x 224: lengths are sums over 150,000 numbers, which fp32 rounds."""
    generator = torch.Generator().manual_seed(0)
    x = 0.3 + 0.4 * torch.rand(2, 3, 224, 224, generator=generator)  # so that no clamp shortens the move
    net = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 2))
    y = net(x).argmax(1)
    torch.manual_seed(1)
    x_adv = parse(attack, threat=L2(eps))(net, x, y)
    moved = (x_adv.double() - x.double()).flatten(1).norm(dim=1)
    assert float(moved.max()) <= eps * (1 + 1e-6)
    assert float(moved.max()) > 0.9 * eps
    require_inside(attack, L2(eps), x_adv, x)


def test_the_check_of_the_ball_leaves_room_for_rounding_and_no_more():
    x = torch.full((1, 3, 224, 224), 0.5)
    for threat in (L2(12.0), Linf(0.1), L1(900.0)):
        edge = threat.ball(x)(x + 0.3)
        require_inside("a", threat, edge, x)
        with pytest.raises(UserError, match="a moved an image by"):
            require_inside("a", threat, x + (edge - x) * 1.0001, x)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.7), L1(2.0)], ids=str)
def test_a_limited_perturbation_is_the_balls_projection_far_from_the_walls(threat: Linf | L2 | L1):
    centre = torch.full((6, 3, 4, 4), 0.5)
    delta = 0.2 * torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    expected = threat.ball(centre)((centre + delta).clone()) - centre
    torch.testing.assert_close(threat.limited(delta), expected, atol=1e-6, rtol=0)
    assert torch.equal(threat.limited(delta / 100), delta / 100)
