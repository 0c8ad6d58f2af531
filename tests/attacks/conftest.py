"""A small network that is robust about half of the time, for attacks to be compared on."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from advalign import models
from advalign.data import Batches, load
from advalign.objectives import compose, parse, total
from advalign.runtime.seeds import seeded
from advalign.threats import Linf


class Target(NamedTuple):
    model: nn.Module
    x: Tensor
    """(200, 1, 8, 8) test images that the model classifies correctly."""
    y: Tensor


@pytest.fixture(scope="session")
def target() -> Target:
    """Digits, trained against Linf(.2) for a few seconds."""
    data = load("digits")
    with seeded("half-robust"):
        net = models.build("small-cnn(width=8)", classes=10, channels=1)
        objective = compose(parse("at"), student=net).train()
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
        batches = Batches(data.train, 64, augment="none", seed=0)
        epochs = 12
        for epoch in range(epochs):
            for x, y in batches.epoch(epoch):
                optimizer.param_groups[0]["lr"] = 0.1 * (1 - epoch / epochs)
                x_adv = objective.perturb(x, y, Linf(0.2), steps=5)
                total(objective(x, x_adv, y)).backward()
                optimizer.step()
                optimizer.zero_grad()
    net.eval()
    x, y = data.test.floats(), data.test.labels
    right = (net(x).argmax(1) == y).nonzero().squeeze(1)[:200]
    return Target(net, x[right], y[right])
