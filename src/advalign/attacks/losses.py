"""The losses that attacks maximise, one value per image: functions (outputs, target) -> (N,). Logits are raw."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.shapes import Labels, Logits, PerImage


def cross_entropy(logits: Logits, y: Labels) -> PerImage:
    """Return -log softmax(logits)[y]."""
    return F.cross_entropy(logits, y, reduction="none")


def margin(logits: Logits, y: Labels) -> PerImage:
    """Return the best other logit minus the true one: positive once fooled. Carlini and Wagner 2017, unclamped."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return rival(logits, y) - true


def probability_margin(logits: Logits, y: Labels) -> PerImage:
    """Return the largest probability of another class minus that of the true one: in [-1, 1], positive once fooled."""
    p = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    return rival(p, y) - p.gather(1, y[:, None]).squeeze(1)


def rival(scores: Logits, y: Labels) -> PerImage:
    """Return the largest score of a class that is not the true one."""
    return scores.masked_fill(F.one_hot(y, scores.shape[1]).bool(), -torch.inf).amax(1)


def dlr(logits: Logits, y: Labels) -> PerImage:
    """Return the difference of logits ratio, (max_{k != y} z_k - z_y) / (z_(1) - z_(3)), z_(i) the i-th largest logit.

    Croce and Hein 2020. Unlike the cross entropy it stays as it is when all logits grow; at least -1, positive once
    fooled. With two classes, where the ratio could only be -1 or 1, the margin alone.
    """
    if logits.shape[1] < 3:
        return margin(logits, y)
    largest = logits.topk(3).values
    return margin(logits, y) / (largest[:, 0] - largest[:, 2] + 1e-12)


def targeted_dlr(logits: Logits, y: Labels, target: Labels) -> PerImage:
    """Return (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), z_(i) the i-th largest logit and t the target class.

    Croce and Hein 2020. With fewer than four classes z_t - z_y alone: over z_(1) - z_(3), the best that three logits
    have, it would be -1 and flat wherever the target comes last.
    """
    gap = logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])
    if logits.shape[1] < 4:
        return gap.squeeze(1)
    largest = logits.topk(4).values
    return gap.squeeze(1) / (largest[:, 0] - largest[:, 2:].mean(1) + 1e-12)


def targeted_margin(logits: Logits, pair: Tensor) -> PerImage:
    """Return z_t - z_y for classes (N, 2) of y and t, which has a slope however sure the model is."""
    return logits.gather(1, pair[:, 1:]).squeeze(1) - logits.gather(1, pair[:, :1]).squeeze(1)


def kl_divergence(logits: Logits, towards: Logits) -> PerImage:
    """Return KL(softmax(towards) || softmax(logits)); TRADES, Zhang et al. 2019, with `towards` the clean logits.

    Gradient flows to both arguments.
    """
    return F.kl_div(F.log_softmax(logits, 1), F.log_softmax(towards, 1), reduction="none", log_target=True).sum(1)
