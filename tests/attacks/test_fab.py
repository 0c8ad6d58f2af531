"""FAB: its projection against brute force, closed forms on linear models, and the authors' code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.networks import Target, tiny
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import FAB, FABT, fab
from advalign.attacks.classification import misclassified
from advalign.attacks.fab import onto_plane
from advalign.errors import UserError
from advalign.threats import L2, Linf, PixelLinf, Threat

NORMS = [Linf(0.1), L2(0.1)]


def planes(n: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Points, some at walls; normals, some entries 0, of many lengths; gaps, of which about a third is in reach."""
    torch.manual_seed(seed)
    x = torch.rand(n, size, dtype=torch.double)
    x[: n // 4] = x[: n // 4].round()
    w = torch.randn_like(x) * (torch.rand_like(x) < 0.8) * 10 ** torch.empty(n, 1, dtype=torch.double).uniform_(-3, 3)
    return x, w, w.abs().sum(1) * torch.empty(n, dtype=torch.double).uniform_(-0.8, 0.8)


def farthest(x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """The corner of [0, 1] where <w, z> is as large, or as small, as the gap wants; x where w is 0."""
    towards = w * gap.sign()[:, None]
    return torch.where(towards > 0, 1.0, torch.where(towards < 0, 0.0, x))


def optimum(threat: Threat, x: Tensor, w: Tensor, gap: float) -> float:
    """The least distance of a point of the box and the plane, by a general solver."""
    optimize = pytest.importorskip("scipy.optimize")
    size, w = len(x), w / w.abs().max()
    bounds = torch.stack([-x, 1 - x], 1).tolist()
    if isinstance(threat, Linf):  # least t with |move_i| <= t
        eye, ones = torch.eye(size), torch.ones(size, 1)
        above = torch.cat([torch.cat([eye, -ones], 1), torch.cat([-eye, -ones], 1)])
        plane = torch.cat([w, torch.zeros(1)])[None]
        found = optimize.linprog(
            [0.0] * size + [1.0], above.tolist(), [0.0] * 2 * size, plane.tolist(), [gap], [*bounds, (0, None)]
        )
        assert found.success
        return float(found.fun)
    found = optimize.minimize(
        lambda move: (move**2).sum(),
        [0.0] * size,
        jac=lambda move: 2 * move,
        bounds=bounds,
        constraints={"type": "eq", "fun": lambda move: move @ w.numpy() - gap, "jac": lambda move: w.numpy()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert found.success
    return math.sqrt(found.fun)


@pytest.mark.parametrize("size", [1, 2, 9])
@pytest.mark.parametrize("threat", NORMS, ids=str)
def test_projection_against_a_solver(threat: Threat, size: int):
    x, w, gap = planes(60, size)
    z = onto_plane(threat, x, w, gap)
    assert ((z >= 0) & (z <= 1)).all()
    corner = farthest(x, w, gap)
    reached = (w * (corner - x)).sum(1).abs() >= gap.abs()
    assert reached.any()
    assert not reached.all()
    torch.testing.assert_close(z[~reached], corner[~reached], atol=1e-12, rtol=0)
    torch.testing.assert_close((w * (z - x)).sum(1)[reached], gap[reached], atol=0, rtol=1e-9)
    for i in reached.nonzero().squeeze(1).tolist():
        if not w[i].any():
            assert torch.equal(z[i], x[i])
            continue
        least = optimum(threat, x[i], w[i], float(gap[i] / w[i].abs().max()))
        assert threat.distance(z[i : i + 1], x[i : i + 1]).item() == pytest.approx(least, abs=1e-6)


@pytest.mark.parametrize("threat", NORMS, ids=str)
def test_projection_of_large_images_in_single_precision(threat: Threat):
    """Against a bisection, in double, for the length of the path."""
    x, w, gap = planes(40, 3072)
    low, high = torch.zeros(40, 1, dtype=torch.double), torch.full((40, 1), 1e9, dtype=torch.double)
    path = w.sign() if isinstance(threat, Linf) else w / w.norm(dim=1, keepdim=True)
    point = x
    for _ in range(200):
        length = (low + high) / 2
        point = (x + length * path * gap.sign()[:, None]).clamp(0, 1)
        short = (w * (point - x)).sum(1, keepdim=True).abs() < gap.abs()[:, None]
        low, high = torch.where(short, length, low), torch.where(short, high, length)
    z = onto_plane(threat, x.float(), w.float(), gap.float())
    torch.testing.assert_close(z.double(), point, atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threat", NORMS, ids=str)
def test_projection_at_the_edges(threat: Threat, dtype: torch.dtype):
    x = torch.tensor([[0.0, 0.5, 1.0]] * 6, dtype=dtype)
    w = torch.tensor([[1, 2, 3], [1, 2, 3], [0, 0, 0], [1, 0, 1], [-1, 0, 1], [1e-25, -1e-25, 1e-25]], dtype=dtype)
    gap = torch.tensor([0, 1e9, 1, -2, 1, 5e-26], dtype=dtype)
    z = onto_plane(threat, x, w, gap)
    assert torch.equal(z[:3], torch.stack([x[0], torch.ones(3, dtype=dtype), x[0]]))  # no gap, out of reach, no plane
    assert z[3].tolist() == [0, 0.5, 0]  # only the last can fall, and not far enough
    assert z[4].tolist() == [0, 0.5, 1]  # both are at their walls
    torch.testing.assert_close((w[5] / 1e-25 * (z[5] - x[5])).sum(), torch.tensor(0.5, dtype=dtype))


class Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


def linear(classes: int) -> tuple[Linear, Tensor, Tensor]:
    """A linear model, images far from the walls, and the model's own labels."""
    torch.manual_seed(classes)
    weight = torch.randn(classes, 48, dtype=torch.double)
    x = 0.45 + 0.1 * torch.rand(12, 3, 4, 4, dtype=torch.double)
    net = Linear(weight, -(weight @ x.flatten(1).mean(0)))
    return net, x, net(x).argmax(1)


@pytest.mark.parametrize("some", [range(3), pytest.param(range(3, 12), marks=pytest.mark.slow)])
@pytest.mark.parametrize("classes", [3, *(pytest.param(many, marks=pytest.mark.slow) for many in (2, 4, 8))])
@pytest.mark.parametrize("make", [FAB, FABT])
@pytest.mark.parametrize("norm", [Linf, L2])
def test_the_least_distance_on_a_linear_model(norm: type[Linf | L2], make: type[FAB | FABT], classes: int, some: range):
    """Found at a radius of .1 % more, not found at .1 % less, image by image."""
    net, x, y = linear(classes)
    with torch.no_grad():
        logits = net(x)
        margins = logits.gather(1, y[:, None]) - logits  # (N, K), 0 for the true class
        normals = net.weight[y][:, None] - net.weight  # (N, K, D)
    lengths = normals.abs().sum(2) if norm is Linf else normals.norm(dim=2)
    least = (margins / lengths).nan_to_num(torch.inf).amin(1)
    for i in some:
        one = slice(i, i + 1)
        for share, found in ((1.001, True), (0.999, False)):
            threat = norm(share * least[i].item())
            x_adv = make(threat, steps=20)(net, x[one], y[one])
            assert misclassified(net, x_adv, y[one]).item() == found
            assert threat.distance(x_adv, x[one]).item() <= threat.eps + 1e-12
            assert found or torch.equal(x_adv, x[one])


def broken(target: Target, x_adv: Tensor, threat: Threat) -> Tensor:
    inside = threat.distance(x_adv, target.x) <= threat.eps + 1e-6
    return misclassified(target.model, x_adv, target.y) & inside


def theirs(target: Target, threat: Threat, *, targeted: bool, seed: int = 0, **arguments: Any) -> Tensor:
    """Which images the authors' code breaks within eps."""
    reference = pytest.importorskip("pyautoattack.fab_pt")
    norm = "Linf" if isinstance(threat, Linf) else "L2"
    attack = reference.FABAttack_PT(
        target.model, norm=norm, eps=threat.eps, targeted=targeted, seed=seed, device="cpu", **arguments
    )
    with torch.random.fork_rng():  # it seeds the global generator
        return broken(target, attack.perturb(target.x, target.y), threat)


def without_final_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fab, "_within", lambda threat, model, x, y, nearest: x)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.2), Linf(0.15), L2(0.8)], ids=str)
def test_as_strong_as_the_authors_code(threat: Threat, target: Target, monkeypatch: pytest.MonkeyPatch):
    pairs = [
        (FABT(threat, steps=10, targets=3), theirs(target, threat, targeted=True, n_iter=10, n_target_classes=3)),
        (FAB(threat, steps=10), theirs(target, threat, targeted=False, n_iter=10)),
    ]
    ours = [broken(target, attack(target.model, target.x, target.y), threat) for attack, _ in pairs]
    without_final_search(monkeypatch)
    for with_search, (attack, reference) in zip(ours, pairs, strict=True):
        plain = broken(target, attack(target.model, target.x, target.y), threat)
        assert 20 < reference.sum() < 180
        assert (plain != reference).sum() <= 1
        assert (plain & ~with_search).sum() == 0


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize("restarts", [1, 3])
@pytest.mark.parametrize("threat", [Linf(0.2), Linf(0.15), L2(0.8)], ids=str)
def test_as_strong_as_the_authors_code_at_full_length(
    threat: Threat, restarts: int, target: Target, monkeypatch: pytest.MonkeyPatch
):
    """On average over the seeds of the restarts; one run has no chance in it."""
    without_final_search(monkeypatch)
    seeds = range(1 if restarts == 1 else 3)
    counts: list[tuple[int, int]] = []
    for seed in seeds:
        torch.manual_seed(seed)
        ours = broken(target, FABT(threat, restarts=restarts)(target.model, target.x, target.y), threat)
        reference = theirs(target, threat, targeted=True, seed=seed, n_iter=100, n_restarts=restarts)
        counts.append((int(ours.sum()), int(reference.sum())))
    assert abs(sum(ours - reference for ours, reference in counts)) <= len(counts)


def walked_to_the_end(attack: FAB | FABT, target: Target, rivals: Tensor) -> Tensor:
    """Which images one run breaks in which none leaves the batch."""
    model, x, y = target
    least, x_adv = torch.full((len(x),), torch.inf), x
    nearest = x
    for _ in range(attack.steps):
        x_adv = fab._step(attack, model, x, y, rivals, x_adv)
        wrong = misclassified(model, x_adv, y)
        distance = attack.threat.distance(x_adv, x)
        closer = wrong & (distance < least)
        least, nearest = torch.where(closer, distance, least), torch.where(closer[:, None, None, None], x_adv, nearest)
        x_adv = torch.where(wrong[:, None, None, None], x + attack.beta * (x_adv - x), x_adv)
    return (least <= attack.threat.eps) | misclassified(model, attack.threat.ball(x)(nearest.clone()), y)


@pytest.mark.slow
@pytest.mark.parametrize("threat", [Linf(0.15), L2(0.8)], ids=str)
def test_what_leaves_the_batch_changes_no_other_verdict(threat: Threat, target: Target):
    model, x, y = target
    with torch.no_grad():
        ranked = model(x).scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
    untargeted, targeted = FAB(threat, steps=8), FABT(threat, steps=8, targets=3)
    ends = [walked_to_the_end(targeted, target, ranked[:, k : k + 1]) for k in range(3)]
    for attack, plain in (
        (untargeted, walked_to_the_end(untargeted, target, ranked)),
        (targeted, torch.stack(ends).any(0)),
    ):
        assert torch.equal(broken(target, attack(model, x, y), threat), plain)
        assert 20 < plain.sum() < 180


@pytest.mark.slow
def test_broken_images_cost_no_further_steps(target: Target):
    sizes: list[int] = []
    handle = target.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    x_adv = FABT(Linf(0.15), steps=8, targets=3)(target.model, target.x, target.y)
    handle.remove()
    wrong = misclassified(target.model, x_adv, target.y)
    assert 0 < wrong.sum() < len(wrong)
    assert sizes[0] == 200
    assert max(sizes[-16:]) < 200
    assert sizes[-1] < sizes[2]
    sizes.clear()
    handle = target.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    wrong_label = (target.y + 1) % 10
    assert torch.equal(FABT(Linf(0.15))(target.model, target.x, wrong_label), target.x)
    handle.remove()
    assert sizes == [200, 200]  # the ranking, and the verdict that all are broken


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.5)], ids=str)
def test_any_number_of_classes(threat: Threat, classes: int):
    x, _ = batch(24)
    net = tiny(0, classes=classes).eval()
    with torch.no_grad():
        net.fc.bias.sub_(net(batch(64)[0]).mean(0))
        y = net(x).argmax(1)
    few, many = (FABT(threat, steps=10, targets=targets)(net, x, y) for targets in (classes - 1, 99))
    assert torch.equal(few, many)
    for x_adv in (many, FAB(threat, steps=10)(net, x, y)):
        wrong = misclassified(net, x_adv, y)
        assert wrong.any()
        assert torch.equal(x_adv[~wrong], x[~wrong])


@pytest.mark.slow
def test_mixed_precision_is_left(target: Target):
    attack = FABT(Linf(0.15), steps=5, targets=2)
    plain = attack(target.model, target.x[:40], target.y[:40])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(attack(target.model, target.x[:40], target.y[:40]), plain)


@pytest.mark.slow
def test_more_restarts_and_targets_never_break_less(target: Target):
    x, y = target.x[:80], target.y[:80]
    wrong = []
    for restarts, targets in ((1, 1), (1, 3), (3, 3)):
        torch.manual_seed(0)
        attack = FABT(L2(0.7), steps=5, restarts=restarts, targets=targets)
        wrong.append(misclassified(target.model, attack(target.model, x, y), y))
    assert (wrong[1] >= wrong[0]).all()
    assert wrong[2].sum() > wrong[1].sum() > wrong[0].sum()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"restarts": 0}, "restarts=0 must be at least 1"),
        ({"targets": 0}, "fab-t: targets=0 must be at least 1"),
        ({"alpha_max": 1.5}, r"alpha_max=1.5 must be in \[0, 1\]"),
        ({"eta": 0.9}, "eta=0.9 must be at least 1"),
        ({"beta": 0.0}, "beta=0.0 must be above 0 and at most 1"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"threat": PixelLinf(0.1, torch.zeros(1, 1, 2, 2))}, r"a norm: linf, l2 or l1, not PixelLinf\(0.1\)"),
    ],
)
def test_refusals(arguments: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        FABT(**{"threat": Linf(), **arguments})
    if "targets" not in arguments:
        with pytest.raises(UserError, match=words):
            FAB(**{"threat": Linf(), **arguments})
