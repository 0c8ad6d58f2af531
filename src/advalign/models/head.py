"""The layer that makes the logits."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn


@final
class Head(nn.Linear):
    """A linear layer that computes in its weights' type also under autocast.

    bfloat16 keeps three digits of a logit: too few for a margin, and for TRADES' first step, whose gradient is the
    difference of two nearly equal distributions.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Map pooled features (N, C) to logits (N, classes)."""
        if input.is_meta:  # a device without autocast
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.to(self.weight.dtype))
