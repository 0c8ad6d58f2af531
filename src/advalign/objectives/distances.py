"""What objectives measure between two outputs, averaged over the batch. N batch, K classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.attacks.losses import Labels, Logits, PerImage, rival


def boosted_cross_entropy(logits: Logits, y: Labels) -> PerImage:
    """Return -log p[y] - log(1 - max of the other p). MART, Wang et al. 2020, eq. 7, with the guards of their code."""
    p = logits.softmax(1)
    return F.cross_entropy(logits, y, reduction="none") - torch.log(1.0001 - rival(p, y) + 1e-12)


def euclidean(features: Tensor, target: Tensor) -> PerImage:
    """Return the unsquared Euclidean distance of each image's flattened features (N, ...)."""
    # The tiny constant keeps the gradient finite at distance zero: a student that starts as the vanilla model.
    return ((features - target).flatten(1).square().sum(1) + 1e-12).sqrt()
