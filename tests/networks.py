"""Networks that the tests share: small enough for hundreds of steps a second, or robust about half of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advalign import models
from advalign.data import Batches, load
from advalign.objectives import compose, parse, total
from advalign.runtime.seeds import seed_generators, seeded
from advalign.threats import Linf
from tests.samples import batch


class TinyNet(nn.Module):
    """Two stages and a head, small enough for hundreds of steps a second."""

    stages = ("layer1", "layer2")

    def __init__(self, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(channels, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def tiny_vit(classes: int = 4, channels: int = 3) -> nn.Module:
    """A transformer of one block over patches of 8 x 8, without positions."""

    class Tokens(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).transpose(1, 2)

    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.Sequential(nn.Conv2d(channels, 8, 8, 8), Tokens(), block, nn.LayerNorm(8), Mean(), nn.Linear(8, classes))


def tiny_convnext(classes: int = 4, channels: int = 3) -> nn.Module:
    """Patches of 4 x 4, a depthwise convolution, one group's norm, GELU and a mean: the parts of a ConvNeXt."""
    depthwise = nn.Conv2d(8, 8, 7, padding=3, groups=8)
    return nn.Sequential(
        nn.Conv2d(channels, 8, 4, 4), depthwise, nn.GroupNorm(1, 8), nn.Conv2d(8, 16, 1), nn.GELU(),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )  # fmt: skip


class Around(nn.Module):
    """A network with something before it and something after it."""

    def __init__(
        self, net: nn.Module, before: Callable[[Tensor], Tensor] = lambda x: x, after: Callable = lambda z: z
    ) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def tiny(seed: int, **arguments: int) -> TinyNet:
    """Build a tiny net with weights and BatchNorm statistics drawn from the seed."""
    seed_generators(seed)
    net = TinyNet(**arguments)
    for norm in (net.layer1[1], net.layer2[1]):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    return net


def sharp(seed: int = 0) -> TinyNet:
    """Return a net with every class near, so that adversaries fool it often, but not always."""
    net = tiny(seed).eval()
    with torch.no_grad():
        net.fc.bias.sub_(net(batch(64)[0]).mean(0))
    return net


def own_labels(net: nn.Module, x: Tensor) -> Tensor:
    """Return the classes (N,) that a network sees in images."""
    with torch.no_grad():
        return net(x).argmax(1)


def fooled(net: nn.Module, x_adv: Tensor, y: Tensor) -> Tensor:
    """Tell which images (N,) a network takes for another class than their label."""
    with torch.no_grad():
        return net(x_adv).argmax(1) != y


def with_random_norms(net: nn.Module) -> nn.Module:
    """Draw scale, shift and statistics of every BatchNorm, as if it had seen data; the network in float64."""
    seed_generators(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    nn.init.uniform_(tensor, 0.5, 1.5)
    return net.double()


def sgd_step(net: nn.Module, x: Tensor) -> None:
    """Train one step in train mode, which also moves the statistics of its norms."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.train()(x).logsumexp(1).sum().backward()
    optimizer.step()


class Target(NamedTuple):
    """A network to attack, with images of which it classifies every one correctly."""

    model: nn.Module
    x: Tensor
    """(200, 1, 8, 8) test images in [0, 1]."""
    y: Tensor


def half_robust() -> Target:
    """Train on digits against Linf(0.2) for a few seconds: robust there about half of the time."""
    data = load("digits")
    with seeded("half-robust"):
        net = models.build("small-cnn(width=8)", classes=10, channels=1)
        objective = compose(parse("at"), student=net).train()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
        batches = Batches(data.train, 64, augment="none", seed=0)
        epochs = 9
        for epoch in range(epochs):
            for x, y in batches.epoch(epoch):
                optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / epochs)
                x_adv = objective.perturb(x, y, Linf(0.2), steps=2, step_size=0.15)
                total(objective(x, x_adv, y)).backward()
                optimizer.step()
                optimizer.zero_grad()
    net.eval()
    x, y = data.test.floats(), data.test.labels
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:200]
    return Target(net, x[right], y[right])
