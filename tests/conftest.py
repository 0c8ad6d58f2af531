from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

torch.set_num_threads(1)  # two workers share two cores
settings.register_profile("unhurried", deadline=None)  # the first call imports, on a busy machine for long
settings.load_profile("unhurried")


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


def tiny(seed: int, **arguments: int) -> TinyNet:
    """A tiny net with weights and BatchNorm statistics drawn from the seed."""
    torch.manual_seed(seed)
    net = TinyNet(**arguments)
    for norm in (net.layer1[1], net.layer2[1]):
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 1.5)
    return net


def batch(n: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(0, classes, (n,), generator=generator)


@pytest.fixture
def x_y() -> tuple[Tensor, Tensor]:
    return batch()
