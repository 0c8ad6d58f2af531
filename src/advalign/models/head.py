"""The layer that makes the logits, and the sizes that every built-in network takes."""

from __future__ import annotations

from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from advalign.errors import require
from advalign.shapes import Logits


@final
class Head(nn.Linear):
    """A linear layer that computes in its weights' type also under autocast.

    bfloat16 keeps three digits of a logit: too few for a margin, and for TRADES' first step, whose gradient is the
    difference of two nearly equal distributions.
    """

    def forward(self, input: Float[Tensor, "N features"]) -> Logits:
        """Map pooled features (N, C) to logits (N, classes)."""
        if input.is_meta:  # a device without autocast
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))


def check_sizes(classes: int, channels: int, width: int) -> None:
    """Refuse sizes that make no classifier.

    Raises:
        UserError: fewer than 2 classes, or channels or width below 1.
    """
    require(classes >= 2, lambda: f"classes={classes} must be at least 2")
    require(channels >= 1, lambda: f"channels={channels} must be at least 1")
    require(width >= 1, lambda: f"width={width} must be at least 1")
