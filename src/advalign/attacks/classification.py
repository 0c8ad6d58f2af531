"""Which images are classified as their labels: decided in plain fp32, since coarser numbers may decide otherwise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from advalign.attacks.pass_counter import PassCounter
from advalign.shapes import ImageBatch, Labels, Logits, Mask


def fooled_in(network: Callable[[Tensor], Tensor], logits: Logits, x_adv: ImageBatch, labels: Labels) -> Mask:
    """Tell which images have left their class; where numbers are coarse, the network confirms it in plain fp32.

    Else attacks would end too early, at images that only seem to fool: under autocast, and with TF32 on a GPU.
    """
    return _confirmed(network, x_adv, ~classified(logits, labels), lambda z, rows: ~classified(z, labels[rows]))


def arrived_in(network: Callable[[Tensor], Tensor], logits: Logits, x_adv: ImageBatch, targets: Labels) -> Mask:
    """Tell which images are classified as their target, confirmed as in `fooled_in`."""
    return _confirmed(network, x_adv, classified(logits, targets), lambda z, rows: classified(z, targets[rows]))


def _confirmed(
    network: Callable[[Tensor], Tensor], x_adv: Tensor, seeming: Mask, decide: Callable[[Tensor, Tensor], Mask]
) -> Mask:
    if (torch.is_autocast_enabled(x_adv.device.type) or _has_tf32(x_adv.device)) and seeming.any():
        rows = seeming.nonzero().squeeze(1)
        seeming[rows] = decide(_original_logits(network, x_adv[rows]), rows)
    return seeming


def _original_logits(network: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    original = network.exact if isinstance(network, PassCounter) else network
    with torch.no_grad(), in_fp32(x.device):
        return original(x)


def misclassified(network: Callable[[Tensor], Tensor], x: ImageBatch, labels: Labels) -> Mask:
    """Tell which images (N, C, H, W) the network takes for another class than their labels (N,), in fp32."""
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return fooled_in(network, network(x), x, labels)


def misclassified_by_original(network: Callable[[Tensor], Tensor], x: ImageBatch, labels: Labels) -> Mask:
    """Tell what `misclassified` does, by the network itself and not by its folded twin, which rounds otherwise."""
    return ~classified(_original_logits(network, x), labels)


def classified(logits: Logits, labels: Labels) -> Mask:
    """Tell which rows (N,) of logits (N, K) are finite and have the label's as their largest."""
    return logits.isfinite().all(1) & (logits.argmax(1) == labels)


@contextmanager
def in_fp32(device: torch.device) -> Iterator[None]:
    """Compute with neither autocast nor TF32 inside: for decisions whether an image withstands."""
    kinds = _multipliers() if _has_tf32(device) else ()
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for kind, was in zip(kinds, before, strict=True):
            kind.fp32_precision = was


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and any(kind.fp32_precision == "tf32" for kind in _multipliers())


def _multipliers() -> tuple[Any, ...]:
    return torch.backends.cudnn.conv, torch.backends.cuda.matmul  # pyright: ignore[reportAttributeAccessIssue] (stub)
