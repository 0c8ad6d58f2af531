"""Means of weights: their end points, what is estimated anew, the soups' settings, and the layer that RiFT tunes."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advalign as aa
from advalign import models
from advalign.data import Batches, Images, load
from advalign.errors import UserError
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.target import load_target
from advalign.frontier.evidence import Evidence
from advalign.frontier.finetune import RADIUS, choose_layer, criticalities, tuned
from advalign.frontier.result import FILE, Frontier, read_frontier
from advalign.frontier.weights import WeightSpace, draw_statistics_images, mean_of_weights, simplex
from advalign.runs import Run
from advalign.threats import Linf

SHAPE = (1, 8, 8)


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = models.build("small-cnn(width=4)", classes=10, channels=1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)  # pyright: ignore[reportOptionalMemberAccess]
            module.running_var.uniform_(0.5, 2)  # pyright: ignore[reportOptionalMemberAccess]
    return net.eval()


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()


def images(n: int = 40, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    return Images(torch.rand(n, *SHAPE, generator=generator), torch.randint(10, (n,), generator=generator))


H, G = network(1), network(2)


def evidence(given: Images) -> Evidence:
    return Evidence(given, Linf(0.1), 16)


def test_the_ends_are_the_two_networks_themselves_with_their_own_statistics():
    dial = WeightSpace("weights", [H, G], images())
    assert dial.network(dial.robust) is H
    assert dial.network(dial.accurate) is G
    assert str(dial.robust) == "share=1"


def test_weights_between_are_the_line_between_and_the_networks_stay_as_they_are():
    before = [{name: value.clone() for name, value in net.state_dict().items()} for net in (H, G)]
    mean = WeightSpace("weights", [H, G], images()).network(WeightSpace("weights", [H, G], None).setting((0.3, 0.7)))
    for (name, mine), h, g in zip(mean.named_parameters(), H.parameters(), G.parameters(), strict=True):
        torch.testing.assert_close(mine, 0.3 * h + 0.7 * g, msg=name)
    for net, was in zip((H, G), before, strict=True):
        assert all(torch.equal(value, was[name]) for name, value in net.state_dict().items())


def test_statistics_are_those_of_the_mean_on_the_training_images():
    given = images(200)
    dial = WeightSpace("weights", [H, G], given)
    mean = dial.network(dial.setting((0.5, 0.5)))
    first: nn.Sequential = mean.layer1  # pyright: ignore[reportAssignmentType]
    seen = first[0](given.floats()).transpose(0, 1).flatten(1)
    torch.testing.assert_close(first[1].running_mean, seen.mean(1))
    torch.testing.assert_close(first[1].running_var, seen.var(1))
    assert not mean.training
    assert first[1].momentum == 0.1


def test_statistics_images_are_drawn_in_an_order_of_chance():
    in_order = Images(torch.rand(100, *SHAPE), torch.arange(10).repeat_interleave(10))
    drawn = draw_statistics_images(in_order)
    assert len(drawn) == 100
    assert drawn.labels.tolist() != in_order.labels.tolist()
    assert drawn.labels[:10].unique().numel() > 3


def test_of_linear_networks_the_mean_of_weights_is_the_mean_of_logits():
    nets, shares = [linear(0), linear(1), linear(2)], (0.2, 0.5, 0.3)
    x = images().floats()
    expected = sum(share * net(x) for share, net in zip(shares, nets, strict=True))
    torch.testing.assert_close(mean_of_weights(nets, shares)(x), expected)


class Tied(nn.Module):
    """A weight under two names."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)
        self.second.weight = self.first.weight
        nn.init.constant_(self.first.weight, value)


def test_a_weight_of_two_names_is_averaged_once():
    mean = mean_of_weights([Tied(1.0), Tied(3.0)], (0.5, 0.5))
    assert mean.get_parameter("first.weight").item() == 2


def test_what_the_networks_have_in_common_stays_to_the_bit():
    other = copy.deepcopy(H)
    with torch.no_grad():
        other.get_parameter("fc.weight").mul_(2)
    mean = mean_of_weights([H, other], (0.3, 0.7))
    changed = {name for name, value in mean.state_dict().items() if not torch.equal(value, H.state_dict()[name])}
    assert changed == {"fc.weight"}


@pytest.mark.parametrize("networks", [2, 3, 4, 9])
@pytest.mark.parametrize("most", [9, 11, 30, 101])
def test_shares_of_a_soup_are_a_grid_of_the_simplex(networks: int, most: int):
    grid = simplex(networks, most)
    assert len(set(grid)) == len(grid) <= most
    assert {tuple(corner) for corner in torch.eye(networks).tolist()} <= set(grid)
    for shares in grid:
        assert math.isclose(sum(shares), 1, abs_tol=1e-9)
        assert min(shares) >= 0
    if networks == 2:
        assert len(grid) == most


def test_settings_are_halved_beside_the_one_that_would_be_chosen():
    dial, shown = WeightSpace("weights", [H, G], None), evidence(images())
    first = dial.propose(shown, 5, 1.0)
    assert [each.values["share"] for each in first] == [0, 0.25, 0.5, 0.75, 1]
    second, third = dial.refine(shown, 5, 1.0), dial.refine(shown, 5, 1.0)
    for proposed, before in ((second, first), (third, first + second)):
        known = sorted(each.values["share"] for each in before)
        middles = {round((a + b) / 2, 4) for a, b in pairwise(known)}
        assert 1 <= len(proposed) <= 2
        assert {each.values["share"] for each in proposed} <= middles
    assert not WeightSpace("soup", [H, G, H], None).refine(shown, 11, 1.0)


def two_units(sign: float) -> nn.Module:
    """A network of two hidden units; with the other sign they change places, and it is the same function."""
    rows = torch.ones(64)
    rows[32:] = -1
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    hidden, last = (torch.stack([sign * rows, -sign * rows]), torch.eye(2) if sign > 0 else torch.eye(2).flip(0))
    net.load_state_dict({"1.weight": hidden, "3.weight": last})
    return net.eval()


@pytest.mark.parametrize(("sign", "warnings"), [(-1.0, 1), (1.0, 0)])
def test_a_collapse_between_the_networks_is_warned_of(sign: float, warnings: int):
    net, other = two_units(1.0), two_units(sign)
    x = images(60).floats()
    assert torch.equal(net(x), other(x))
    shown = evidence(Images(x, net(x).argmax(1)))
    dial = WeightSpace("weights", [net, other], None)
    dial.propose(shown, 3, 1.0)
    said = dial.warnings(shown)
    assert len(said) == warnings
    assert all("different basins" in line and "share=0.5" in line for line in said)


class WithIdleLayer(nn.Module):
    """A linear classifier, a layer that makes no logit, and one whose output is multiplied by 0."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.idle, self.muted = (nn.Linear(64, 10) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x.flatten(1)) + 0 * self.muted(x.flatten(1))


def test_layers_that_the_loss_does_not_depend_on_are_not_critical_and_not_tuned():
    net = WithIdleLayer().eval()
    found = criticalities(net, images(), Linf(0.05), seed=0)
    assert found["idle"] == found["muted"] == 0
    assert found["used"] > 0
    assert choose_layer(found) == "used"
    with pytest.raises(UserError, match="needs a convolution"):
        choose_layer({"idle": 0.0})


def test_criticality_of_a_linear_network_is_the_worst_rise_of_the_loss_in_the_ball_of_weights():
    """The loss is convex in the weights: no random change of the same norm may raise it more than the ascent."""
    net, given = linear(3), images()
    found = criticalities(net, given, Linf(1e-9), seed=0)["1"]  # attacked by nothing
    weight, x = net.get_parameter("1.weight"), given.floats().flatten(1)
    bias = net.get_parameter("1.bias")
    start = F.cross_entropy(net(given.floats()), given.labels)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        change = torch.randn(weight.shape, generator=generator)
        change *= RADIUS * weight.norm() / change.norm()
        assert F.cross_entropy(x @ (weight + change).T + bias, given.labels) - start < found
    largest = 2**0.5 * x.norm(dim=1).max() * RADIUS * weight.norm()  # of the change of a difference of two logits
    assert found < largest


def test_criticality_leaves_the_network_as_it_was():
    net = copy.deepcopy(H)
    found = criticalities(net, images(), Linf(0.1), seed=0)
    assert list(found) == ["layer1.0", "layer2.0", "layer3.0", "fc"]
    assert min(found.values()) > 0
    assert all(
        torch.equal(mine, was) for mine, was in zip(net.state_dict().values(), H.state_dict().values(), strict=True)
    )


def test_only_the_chosen_layer_is_tuned_and_it_learns():
    given = images(256)
    net = tuned(H, "layer2.0", Batches(given, 64, augment="none", seed=0), given)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, H.state_dict()[name])}
    assert changed == {"layer2.0.weight"}  # and no running statistics, nor a layer whose name has this one's inside
    with torch.no_grad():
        loss = [float(F.cross_entropy(each(given.floats()), given.labels)) for each in (H, net)]
    assert loss[1] < loss[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    folder, recipe = tmp_path_factory.mktemp("runs"), aa.Recipe(epochs=1, steps=1, subset=64, validation=16)
    made = []
    for method, model in (("at", 2), ("natural", 2), ("natural", 3)):
        made.append(aa.train(method, data="digits", model=f"small-cnn(width={model})", recipe=recipe, runs=folder))
    return made


SMALL = TargetOptions(n=12)


def trace(sources: list[Run], method: str, folder: Path, shown: TargetOptions = SMALL) -> Frontier:
    return aa.frontier(
        *(run.path for run in sources), method=method, points=3, attacks=["fgsm"], curve_attack="fgsm", held_out=12,
        target_options=shown, out=folder,
    )  # fmt: skip


def run_of(traced: Frontier) -> Run:
    assert traced.run is not None
    return traced.run


@pytest.mark.parametrize("method", ["weights", "soup"])
def test_networks_of_two_architectures_are_refused(method: str, runs: list[Run], tmp_path: Path):
    with pytest.raises(UserError, match=r"one architecture, not small-cnn\(width=2\) and small-cnn\(width=3\)"):
        trace([runs[0], runs[2]], method, tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("method", "networks", "message"),
    [
        ("finetune", 2, "takes the robust network alone, not 2"),
        ("soup", 1, "takes 2 to 9 robust networks, not 1"),
        ("weights", 3, "takes a robust network and an accurate one, not 3"),
        ("weight", 2, "weights"),
    ],
)
def test_numbers_of_networks_that_a_method_does_not_take_are_refused(
    method: str, networks: int, message: str, runs: list[Run]
):
    with pytest.raises(UserError, match=message):
        aa.frontier(*(run.path for run in runs[:networks]), method=method)


@pytest.mark.parametrize(
    ("method", "members"),
    [("weights", 2), *(pytest.param(*each, marks=pytest.mark.slow) for each in (("finetune", 1), ("soup", 2)))],
)
def test_the_chosen_network_is_a_run_like_any_other(method: str, members: int, runs: list[Run], tmp_path: Path):
    traced = trace(runs[:members], method, tmp_path / "out")
    assert run_of(traced).setting["model"] == "small-cnn(width=2)"
    x = load("digits").test.floats()[:32]
    assert torch.equal(aa.load(run_of(traced).path)(x), traced.network(x))
    stored = read_frontier(traced.path / FILE)
    assert stored.content["method"] == method
    assert [point.setting for point in stored.test.points] == [point.setting for point in traced.test.points]
    target = load_target(run_of(traced).path, SMALL)
    assert target.method == run_of(traced).setting["method"]
    assert target.method.startswith(f"{method}(at, " if method != "weights" else "weights(at, natural, share=")
    again = trace(runs[:members], method, tmp_path / "out")
    assert run_of(again).id == run_of(traced).id


def test_values_that_the_made_network_would_lack_are_refused(runs: list[Run]):
    normalised = TargetOptions(data="digits", mean=(0.5,), std=(0.5,))
    with pytest.raises(UserError, match="normalized"):
        aa.frontier(runs[0].path, runs[1].path, target_options=normalised)


@pytest.mark.slow
def test_other_test_images_in_the_same_folder_are_attacked_anew(runs: list[Run], tmp_path: Path):
    for n in (12, 16):
        assert trace(runs[:2], "soup", tmp_path / "out", TargetOptions(n=n)).test.images == n


@pytest.mark.slow
def test_weights_from_elsewhere_are_averaged_on_test_images_set_apart(runs: list[Run], tmp_path: Path):
    """Which images they were trained on is not known: the data's training images give the statistics."""
    named = []
    for number, run in enumerate(runs[:2]):
        torch.save(aa.load(run.path).state_dict(), tmp_path / f"{number}.pt")
        named.append(f"small-cnn(width=2)@{tmp_path / f'{number}.pt'}")
    traced = aa.frontier(
        *named, method="weights", points=3, give=100, attacks=[], curve_attack="fgsm", held_out="test:12",
        target_options=TargetOptions(data="digits", n=30), out=tmp_path / "out", runs=tmp_path / "runs",
    )  # fmt: skip
    x = load("digits").test.floats()[:32]
    assert torch.equal(aa.load(run_of(traced).path)(x), traced.network(x))
    assert traced.test.images == 18
