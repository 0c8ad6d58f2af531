"""What attacks climb, per example: functions (outputs, target) -> (N,). N batch, K classes; logits are unnormalised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Logits = Float[Tensor, "N K"]
Labels = Int[Tensor, "N"]
PerImage = Float[Tensor, "N"]


def cross_entropy(logits: Logits, y: Labels) -> PerImage:
    """Return -log softmax(logits)[y]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> PerImage:
    """Return the best other logit minus the true one: positive once fooled. Carlini and Wagner 2017, unclamped."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return rival(logits, y) - true


def rival(scores: Logits, y: Labels) -> PerImage:
    """Return the largest score of a class that is not the true one."""
    return scores.masked_fill(F.one_hot(y, scores.shape[1]).bool(), -torch.inf).amax(1)


def kl_divergence(logits: Logits, towards: Logits) -> PerImage:
    """Return KL(softmax(towards) || softmax(logits)); TRADES, Zhang et al. 2019, with `towards` the clean logits.

    Gradient flows to both arguments.
    """
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(towards, 1), reduction="none", log_target=True).sum(1)
