"""A network that computes only what a square reaches gives what the whole network gives."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from tests.networks import Target
from torch import Tensor, nn

from advalign import models
from advalign.attacks.pass_counter import PassCounter
from advalign.attacks.square import Square
from advalign.models.fold import Folded
from advalign.models.local import LocalNet, LocalRun
from advalign.runtime.seeds import seeded
from advalign.threats import Linf


class Odd(nn.Module):
    """Rectangular kernels, strides, dilation, groups, pooling, a constant, work in place, a map read three times."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.rand(1, 3, 1, 1))
        self.wide = nn.Conv2d(3, 6, (3, 5), stride=(1, 2), padding=(1, 2))
        self.far = nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=3)
        self.sparse = nn.Conv2d(6, 6, 1, stride=3)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.wide((x - self.get_buffer("mean")) / 0.25))
        y = self.far(x) + x
        y += 0.5 * x
        y = self.sparse(self.norm(y))
        return self.fc(self.pool(torch.sigmoid(y)).mean((2, 3)))


def _random_walk(net: nn.Module, images: Tensor, side: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Change squares, accept some, drop some images; return pairs of what the local and the whole network say."""
    folded = Folded(net.eval())
    local = LocalNet(folded.twin, images[:1])
    with torch.no_grad():
        run = LocalRun(local, local._plan(side), images)
        pairs, best = list[tuple[Tensor, Tensor]](), images
        for step in range(steps):
            top = torch.randint(0, best.shape[2] - side + 1, (len(best),))
            left = torch.randint(0, best.shape[3] - side + 1, (len(best),))
            top[:2], left[:2] = best.shape[2] - side, torch.tensor([0, best.shape[3] - side])  # corners, too
            changed = best.clone()
            for row, (i, j) in enumerate(zip(top.tolist(), left.tolist(), strict=True)):
                changed[row, :, i : i + side, j : j + side] = torch.rand(best.shape[1], 1, 1)
            pairs.append((run.propose(changed, top, left), net(changed)))
            accepted = torch.rand(len(best)) < 0.4
            run.keep(accepted)
            best = torch.where(accepted.view(-1, 1, 1, 1), changed, best)
            if step % 3 == 2:
                stay = torch.arange(len(best)) != 1
                run.take(stay)
                best = best[stay]
    return pairs


def _double(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = (
                torch.rand(module.num_features),
                torch.rand(module.num_features) + 1,
            )
    return net.double().eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "spelling",
    [
        "small-cnn(width=4)",
        "resnet18(width=4)",
        "preact-resnet18(width=4)",
        "wide-resnet-28-10(width=1)",
        "vgg16(width=4)",
    ],
)
@pytest.mark.parametrize("side", [1, 4])
def test_squares_that_come_and_go_give_what_the_whole_network_gives(spelling: str, side: int):
    net = _double(models.build(spelling, classes=10))
    for ours, whole in _random_walk(net, torch.rand(5, 3, 32, 32, dtype=torch.float64), side, 5):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", [1, 2, 3, 7])
def test_any_kernel_stride_padding_and_form_of_image(side: int):
    net = _double(Odd())
    for ours, whole in _random_walk(net, torch.rand(6, 3, 21, 28, dtype=torch.float64), side, 9):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-12)


def test_a_window_is_computed_and_no_more():
    local = LocalNet(Folded(models.build("small-cnn(width=4)", classes=10).eval()).twin, torch.rand(1, 3, 32, 32))
    sizes = [window[0].size for node, window in local._plan(4).windows.items() if node in local.convolutions]
    assert sizes == [6, 4, 3]  # (4 + 2), then at most 4 of every second row, then 3 of those


class Noisy(nn.Module):
    """A randomised defence in front of a network."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + 0.01 * torch.randn_like(x))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows are taken however few the images are."""
    monkeypatch.setattr("advalign.models.local.STARTED", 0)


@pytest.mark.usefixtures("free")
def test_noise_is_drawn_anew_and_hooks_on_blocks_see_whole_maps():
    net = models.build("small-cnn(width=4)", classes=10).eval()
    images = torch.rand(2, 3, 32, 32)
    assert LocalNet(net, images[:1]).begin(images, 1) is not None
    assert LocalNet(Noisy(net), images[:1]).begin(images, 1) is None
    net.get_submodule("layer1").register_forward_hook(lambda *_: None)
    assert LocalNet(net, images[:1]).begin(images, 1) is None


@pytest.mark.usefixtures("free")
def test_large_squares_and_much_memory_run_the_whole_network(monkeypatch: pytest.MonkeyPatch):
    local = LocalNet(models.build("small-cnn(width=4)", classes=10).eval(), torch.rand(1, 3, 32, 32))
    images = torch.rand(2, 3, 32, 32)
    assert local.begin(images, 1) is not None
    assert local.begin(images, 28) is None
    monkeypatch.setattr("advalign.models.local.MEMORY", 1000)
    assert local.begin(images, 1) is None


@pytest.mark.usefixtures("free")
def test_few_images_do_not_pay_for_many_small_operations(monkeypatch: pytest.MonkeyPatch):
    local = LocalNet(models.build("small-cnn(width=16)", classes=10).eval(), torch.rand(1, 3, 32, 32))
    assert local.begin(torch.rand(2, 3, 32, 32), 1) is not None
    monkeypatch.setattr("advalign.models.local.STARTED", 1e7)
    assert local.begin(torch.rand(2, 3, 32, 32), 1) is None
    assert local.begin(torch.rand(200, 3, 32, 32), 1) is not None


class Lying(nn.Module):
    """A network that torch.fx traces to something else: a branch on a number that each call changes."""

    calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = models.build("small-cnn(width=4)", classes=10)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.net(x) * (1 if self.calls % 2 else -1)


@pytest.mark.usefixtures("free")
def test_each_side_is_tried_before_it_is_used(monkeypatch: pytest.MonkeyPatch):
    images = torch.rand(4, 3, 32, 32)
    counter = PassCounter(models.build("small-cnn(width=4)", classes=10).eval())
    assert counter.begin_local(images, 28) is None  # too large
    assert counter.begin_local(images, 2) is not None
    assert counter.begin_local(torch.rand(4, 3, 20, 20), 2) is None  # traced for others
    keep = LocalRun.keep
    monkeypatch.setattr(LocalRun, "keep", lambda run, accepted: keep(run, ~accepted))
    assert counter.begin_local(images, 1) is None
    monkeypatch.undo()
    assert counter.begin_local(images, 2) is None  # nothing more is tried of this network


@pytest.mark.usefixtures("free")
def test_a_trace_that_gives_something_else_is_not_used():
    images = torch.rand(4, 3, 32, 32)
    counter = PassCounter(models.build("small-cnn(width=4)", classes=10).eval())
    assert counter.begin_local(images, 1) is not None
    with torch.autocast("cpu"):
        assert counter.begin_local(images, 1) is None
    assert PassCounter(Lying().eval()).begin_local(images, 1) is None


def test_square_finds_the_same_by_windows_and_by_whole_passes(target: Target, monkeypatch: pytest.MonkeyPatch):
    net, x, y, found = copy.deepcopy(target.model).double(), target.x[:60].double(), target.y[:60], []
    for worth in (9.0, 0.0):
        monkeypatch.setattr("advalign.models.local.WORTH", worth)
        counter, calls = PassCounter(net), list[int]()
        monkeypatch.setattr(counter, "propose", lambda *args: calls.append(1) or PassCounter.propose(counter, *args))
        with seeded("square"):
            found.append(Square(Linf(0.2), queries=90, p_init=0.1)(counter, x, y))
        assert (len(calls) > 80) == (worth > 0)
    with torch.no_grad():
        withstand, left = (int((net(images).argmax(1) == y).sum()) for images in (x, found[0]))
    assert 5 < left < withstand - 5  # some leave on the way
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


class InPlace(nn.Module):
    """A network that works in place on its images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.build("small-cnn(width=4)", classes=10)

    def forward(self, x: Tensor) -> Tensor:
        x *= 2
        x -= 1
        return self.net(x)


@pytest.mark.usefixtures("free")
def test_a_network_that_works_in_place_on_its_images_gets_copies():
    images = torch.rand(4, 3, 32, 32)
    before, counter = images.clone(), PassCounter(InPlace().eval())
    run = counter.begin_local(images, 2)
    assert run is not None
    corner = torch.zeros(4, dtype=torch.int64)
    changed = images.clone()
    changed[:, :, :2, :2] = 0
    torch.testing.assert_close(counter.propose(run, changed, corner, corner), counter(changed), rtol=0, atol=1e-5)
    assert torch.equal(images, before)
    x_adv = Square(Linf(0.05), queries=20, p_init=0.01)(counter, images, counter(images).argmax(1))
    assert float((x_adv - before).abs().max()) < 0.0501
    assert torch.equal(images, before)


class SharedMap(nn.Module):
    """In place on a map that is read once more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv(x)
        return self.fc((torch.nn.functional.hardtanh(out, -0.2, 0.2, inplace=True) * 2 + out).mean((2, 3)))


class Tossing(nn.Module):
    """A coin is tossed where torch.fx sees only one side."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.build("small-cnn(width=4)", classes=10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flip(3) if random.random() < 1e-9 else x)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("net", [SharedMap, Tossing])
def test_what_windows_would_change_runs_whole(net: type[nn.Module]):
    images = torch.rand(4, 3, 32, 32)
    assert LocalNet(net().eval(), images[:1]).begin(images, 1) is None


@pytest.mark.usefixtures("free")
def test_a_fault_of_the_fast_path_is_no_fault_of_the_attack(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LocalRun, "keep", lambda *_: 1 / 0)
    counter, images = PassCounter(models.build("small-cnn(width=4)", classes=10).eval()), torch.rand(4, 3, 32, 32)
    assert counter.begin_local(images, 1) is None


@pytest.mark.usefixtures("free")
def test_trials_are_no_queries():
    counter, images = PassCounter(models.build("small-cnn(width=4)", classes=10).eval()), torch.rand(4, 3, 32, 32)
    Square(Linf(1e-4), queries=30, p_init=0.01)(counter, images, counter.net(images).argmax(1))
    assert counter.counts == [4 * 30, 0]
