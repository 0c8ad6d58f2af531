"""Linear models, for which it is known how far each image can be pushed in L1."""

from __future__ import annotations

import torch
from tests.networks import own_labels
from torch import Tensor, nn

EPS = 0.8


def most(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The most that <weight, z> can grow within L1(eps) and [0, 1]: the largest weights go to their walls first."""
    gains = []
    for image, weights in zip(x.flatten(1).tolist(), weight.flatten(1).tolist(), strict=True):
        left, gain = eps, 0.0
        for value, slope in sorted(zip(image, weights, strict=True), key=lambda each: -abs(each[1])):
            step = min(left, 1 - value if slope > 0 else value)
            left, gain = left - step, gain + step * abs(slope)
        gains.append(gain)
    return torch.tensor(gains, dtype=torch.double)


def linear(classes: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A linear model, its images and labels, and by how much each can be pushed across a boundary; below 0 never."""
    generator = torch.Generator().manual_seed(classes)
    layer = nn.Linear(48, classes).double()
    x = torch.rand(60, 3, 4, 4, generator=generator, dtype=torch.double)
    x[:20] = x[:20].round()
    weight = torch.randn(classes, 48, generator=generator, dtype=torch.double)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-(x.flatten(1) @ weight.T).mean(0))
    model = nn.Sequential(nn.Flatten(), layer)
    y = own_labels(model, x)
    with torch.no_grad():
        gaps = model(x) - model(x).gather(1, y[:, None])
    pushed = torch.stack([most(x, weight[k] - weight[y], EPS) for k in range(classes)], 1) + gaps
    return model, x, y, pushed.scatter(1, y[:, None], -torch.inf).amax(1)
