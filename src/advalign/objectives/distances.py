"""What objectives measure between two outputs, averaged over the batch. N batch, K classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from advalign.attacks.losses import rival
from advalign.runtime import ranks
from advalign.runtime.device import without_autocast
from advalign.shapes import Features, Labels, Logits, PerImage

Scalar = Float[Tensor, ""]
Anchors = Float[Tensor, "N D"]
Others = Float[Tensor, "M D"]
OthersLabels = Int[Tensor, "M"]


def boosted_cross_entropy(logits: Logits, y: Labels) -> PerImage:
    """Return -log p[y] - log(1 - max of the other p). MART, Wang et al. 2020, eq. 7, with the guards of their code."""
    p = logits.softmax(1)
    return F.cross_entropy(logits, y, reduction="none") - torch.log(1.0001 - rival(p, y) + 1e-12)


def soft_cross_entropy(logits: Logits, target: Logits) -> PerImage:
    """Return -sum_k target[k] log softmax(logits)[k] for a distribution over the classes (N, K)."""
    return F.cross_entropy(logits, target, reduction="none")


def pairwise_gap(logits: Logits, target: Logits, weights: Logits) -> PerImage:
    """Return 1/4 sum_jk q_j q_k ((o_j - o_k) - (t_j - t_k))^2 for class weights q that sum to 1. Cui et al. 2024.

    Computed in O(K): it is half the variance of o - t under q.
    """
    gap = logits - target
    mean = (weights * gap).sum(1, keepdim=True)
    return 0.5 * (weights * (gap - mean).square()).sum(1)


def jensen_shannon(*log_ps: Logits, least: float = 1e-8) -> Scalar:
    """Return the mean of KL(p || m) over several predictions p, given as logarithms (N, K), and their mean m.

    Args:
        log_ps: the predictions' logarithms.
        least: m is at least this.
    """
    log_p = torch.stack(log_ps)
    log_mean = log_p.exp().mean(0).clamp_min(least).log()
    return (log_p.exp() * (log_p - log_mean)).sum(2).mean()


def euclidean(features: Features, target: Features) -> Scalar:
    """Return the mean over the batch of the unsquared norm of each image's flattened difference (N, ...)."""
    return _root((features - target).flatten(1).square().sum(1)).mean()


def squared(features: Features, target: Features) -> Scalar:
    """Return the mean over the batch of the squared norm of each image's flattened difference (N, ...)."""
    return (features - target).flatten(1).square().sum(1).mean()


def whole_batch(features: Features, target: Features) -> Scalar:
    """Return the unsquared norm of the whole batch's difference (N, ...) as one vector; it grows with sqrt(N)."""
    return _root(ranks.all_sum((features - target).square().sum()))


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "euclidean": euclidean,
    "squared": squared,
    "mean-squared": F.mse_loss,
    "whole-batch": whole_batch,
}


def supervised_contrast(
    anchors: Anchors,
    y: Labels,
    others: Others,
    labels: OthersLabels,
    temperature: float,
    *,
    left_out: Tensor | None = None,
) -> PerImage:
    """Return -mean over positives j of log(exp(u_i.u_j / t) / sum over all a of exp(u_i.u_a / t)), for each anchor i.

    Khosla et al. 2020, eq. 2; positives are the others of the anchor's class. Of unit vectors u.

    Args:
        anchors: (N, D), with labels y (N,).
        others: (M, D), what anchors are compared with, with labels (M,).
        temperature: t.
        left_out: (N,) where each anchor itself stands among the others: it is not compared with itself.
    """
    with without_autocast(anchors.device):  # bf16 is too coarse to divide by a temperature
        similar = anchors @ others.T / temperature
    positive = y[:, None] == labels[None, :]
    if left_out is not None:
        itself = torch.arange(len(others), device=y.device) == left_out[:, None]
        similar, positive = similar.masked_fill(itself, -torch.inf), positive & ~itself
    log_share = similar - similar.logsumexp(1, keepdim=True)
    return -log_share.masked_fill(~positive, 0).sum(1) / positive.sum(1)


def _root(x: Tensor) -> Tensor:
    # The tiny constant keeps the gradient finite at distance zero: a student that starts as the vanilla model.
    return (x + 1e-12).sqrt()
