"""Networks that draw at random, as the classifier that their mean prediction is: for attacks and for evaluation."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor, nn

from advalign.errors import require
from advalign.shapes import ImageBatch, Logits


@final
class Averaged(nn.Module):
    """The mean prediction of a network over several random draws: log of the mean softmax.

    Attacks on it follow the expectation over the draws (EOT, Athalye et al. 2018): one gradient is that of `draws`
    passes. An image counts as broken where the mean prediction of fresh draws is wrong, and not where one draw is.

    Args:
        draws: passes through the network for each answer.

    Example:
        >>> import advalign as aa
        >>> net = aa.models.build("small-cnn(width=4)", classes=10)
        >>> steady = aa.models.Averaged(net, draws=20)

    Raises:
        UserError: draws below 1.
    """

    def __init__(self, net: nn.Module, draws: int = 20) -> None:
        super().__init__()
        require(draws >= 1, lambda: f"averaged: draws={draws} must be at least 1")
        self.net, self.draws = net, draws

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) in [0, 1] to log-probabilities (N, K)."""
        each = torch.stack([self._log_probabilities(x) for _ in range(self.draws)])
        return each.logsumexp(0) - math.log(self.draws)

    def _log_probabilities(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
