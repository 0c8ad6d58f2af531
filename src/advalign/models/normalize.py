"""Normalisation as a network's first layer, so that attacks work on images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from advalign.errors import require
from advalign.shapes import ImageBatch


@final
class Normalized(nn.Module):
    """A network behind `(x - mean) / std`, channel by channel. Layer names (`layer4`) stay those of the network inside.

    Raises:
        UserError: mean and std differ in length, or a std is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        require(
            len(mean) == len(std),
            lambda: f"mean has {len(mean)} channels, std has {len(std)}: give one of each a channel",
        )
        require(min(std) > 0, lambda: f"std={min(std)} must be positive")
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: ImageBatch) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, classes)."""
        return self.net((x - self.mean) / self.std)
