"""Two networks as one: the robust one's probabilities mixed with the accurate one's, after both are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from torch import nn

from advalign.errors import require
from advalign.shapes import ImageBatch, Logits

LARGEST = 250
"""Logits at most over which `transformed` standardises, the largest ones, as MixedNUTS does."""


@final
class Mix(nn.Module):
    """log((1 - w) softmax(g / T) + w softmax(M(h))) of an accurate network g and a robust one h. Bai et al. 2024.

    At w = 1 it is h itself, without M, and at w = 0 it is g. The logarithm makes cross entropy and the difference of
    logits ratio what they are for any network. It is computed from log-probabilities in float64, so that no value
    saturates: decisions may hang on margins of 1e-3. A sharp g is flat all the same where it is sure: attack mixes of a
    higher T as well, and show their examples to this one.

    Args:
        robust, accurate: maps from images (N, C, H, W) to logits (N, classes).
        weight: w, the robust network's share, in [0, 1].
        temperature: T; at 0, g counts as the indicator of its largest logit. It has no gradient, so that of the
            standardised logits is taken, whatever their scale, or attacks would see nothing of g.
        transform: scale, power and shift of M, see `transformed`; the identity if empty.

    Raises:
        UserError: a value out of range.
    """

    def __init__(
        self,
        robust: nn.Module,
        accurate: nn.Module,
        weight: float,
        temperature: float = 1.0,
        transform: Sequence[float] = (),
    ) -> None:
        super().__init__()
        require(0 <= weight <= 1, lambda: f"mix: weight={weight:g} must be in [0, 1]")
        require(temperature >= 0, lambda: f"mix: temperature={temperature:g} must be at least 0")
        check_transform(transform)
        self.accurate, self.robust = accurate, robust
        self.weight, self.temperature, self.transform = weight, temperature, tuple(transform)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) in [0, 1] to log-probabilities (N, classes)."""
        if self.weight == 1:
            return self.robust(x)
        if self.weight == 0:
            return self.accurate(x)
        return mixed(self.robust(x), self.accurate(x), self.weight, self.temperature, self.transform)


@torch.fx.wrap  # one node when BatchNorms are folded: what is inside looks at sizes
def mixed(
    robust: Logits, accurate: Logits, weight: float, temperature: float = 1.0, transform: Sequence[float] = ()
) -> Logits:
    """Return the log-probabilities (N, K) of a mix from the logits of its members, for a weight inside (0, 1)."""
    kind = torch.float32 if robust.device.type == "mps" else torch.float64  # which Apple's devices do not have
    robust, accurate = robust.to(kind), accurate.to(kind)
    log_h = F.log_softmax(transformed(robust, transform), 1) + math.log(weight)
    blunt = accurate / temperature if temperature else standardised(accurate)
    soft = torch.logaddexp(F.log_softmax(blunt, 1) + math.log1p(-weight), log_h)
    if temperature:
        return soft
    largest = torch.full_like(accurate, -torch.inf).scatter(1, accurate.argmax(1, keepdim=True), math.log1p(-weight))
    return soft + (torch.logaddexp(largest, log_h) - soft).detach()


def transformed(logits: Logits, transform: Sequence[float]) -> Logits:
    """Return M(z) of MixedNUTS: scale * sign(v) |v|^power, v = GELU(u + shift), u the standardised logits.

    Bai, Zhou, Patel and Sojoudi 2024 (TMLR), section 4. Standardised by mean and variance of the `LARGEST` logits.

    Args:
        logits: (N, K).
        transform: scale, power, shift; nothing is done if empty.
    """
    if not transform:
        return logits
    scale, power, shift = transform
    v = F.gelu(standardised(logits) + shift)
    # Not |v|^power, whose derivative is not finite at 0 for powers below 1.
    return scale * v.sign() * v.abs().clamp_min(torch.finfo(v.dtype).tiny).pow(power)


def standardised(logits: Logits) -> Logits:
    """Return logits (N, K) with mean 0 and variance 1 over the `LARGEST` of each row."""
    largest = logits.topk(min(LARGEST, logits.shape[1]), dim=1).values
    variance = largest.var(1, keepdim=True) if largest.shape[1] > 1 else torch.zeros_like(largest)
    return (logits - largest.mean(1, keepdim=True)) / (variance + 1e-8).sqrt()


def check_transform(transform: Sequence[float]) -> None:
    """Refuse a transform that turns the order of classes round.

    Raises:
        UserError: it is not three numbers, or scale or power is not above 0.
    """
    require(
        len(transform) in (0, 3),
        lambda: f"mix: transform={tuple(transform)} must be three numbers: scale, power, shift",
    )
    for name, value in zip(("scale", "power"), transform, strict=False):
        require(value > 0, lambda: f"mix: the transform's {name}={value:g} must be above 0")
