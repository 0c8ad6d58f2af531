"""Pixel-reweighted adversarial training: pixels that decide little may be moved less."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from advalign.errors import require
from advalign.models import last_stage
from advalign.models.taps import Tapped
from advalign.objectives.contract import ADV, Network, Outputs, Terms
from advalign.objectives.method import PlugIn
from advalign.runtime.device import without_autocast
from advalign.shapes import ImageBatch, Labels
from advalign.threats import Linf, PixelLinf, Threat


@final
class PART(PlugIn):
    """x' moves by eps where the class-activation map of f(x) is high, by low eps elsewhere. Zhang et al. 2024 (PART).

    The map is Grad-CAM for the predicted class, of the clean batch at hand, by the network as it is at this step and in
    the mode of the attack. A colour channel of a pixel is important where the map, in [0, 1], scaled up to the image,
    squared and coloured by `jet`, lies above its mean over the image by more than a standard deviation. Joined to at,
    trades and mart it is the paper's PART, PART-T and PART-M. It adds no term to the loss; it costs one forward of the
    student, and the backward down to the layer.

    The authors' code takes the maps of one pass of its shuffled, augmented loader, and applies them by the batches'
    numbers to the next pass, in another order: each image gets the box of another image.

    Args:
        low: radius of the unimportant pixels, as a share of the threat's eps; the paper's 7/255 of 8/255.
        warmup: share of the epochs at the beginning in which all pixels get the whole eps; the paper's 20 of 80. A
            training loop of your own passes it to `objective.start_epoch(batches, epoch / epochs)`.
        layer: a module's name whose output is (N, C, H, W); the last stage (layer4 of resnet18) if None.

    Raises:
        UserError: a share is out of range; when bound, a layer that does not exist; in a step, a layer without an
            image-like output, or a threat that is not linf.
    """

    name = "part"
    replaces = frozenset({"threat"})
    needs = (ADV,)
    warming = False

    def __init__(self, low: float = 7 / 8, warmup: float = 0.25, layer: str | None = None) -> None:
        super().__init__()
        require(0 <= low <= 1, lambda: f"part: low={low:g} must be in [0, 1], a share of the threat's eps")
        require(0 <= warmup < 1, lambda: f"part: warmup={warmup:g} must be in [0, 1), a share of the epochs")
        self.low, self.warmup, self.layer = low, warmup, layer

    def get_extra_state(self) -> Tensor:
        """Return whether the epoch belongs to the warm-up, for a resumed run."""
        return torch.tensor(self.warming)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore it."""
        self.warming = bool(state)

    def adapt(self, student: nn.Module) -> nn.Module:
        """Choose the layer."""
        self.mapped = last_stage(student) if self.layer is None else self.layer
        return student

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the one layer whose activations the map is made of."""
        return (self.mapped,)

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Record whether the epoch belongs to the warm-up."""
        self.warming = progress < self.warmup

    def attack_threat(self, student: Network, x: ImageBatch, threat: Threat) -> Threat:
        """Return the box around images (N, C, H, W): the whole radius on important pixels, and in the warm-up."""
        require(
            isinstance(threat, Linf),
            lambda: f"part is defined for linf, not for {threat}: it sets the radius of pixels",
        )
        if self.warming:
            return threat
        radii = torch.full_like(x, self.low * threat.eps)
        radii.masked_fill_(important(self._map(student, x), x.shape), threat.eps)
        return PixelLinf(threat.eps, radii)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return nothing: the base's loss is taken as it is, on other examples."""
        return {}

    def _map(self, student: Network, x: Tensor) -> Tensor:
        """Return Grad-CAM for the predicted class, (N, h, w): activations weighted by their mean gradients, ReLU'd."""
        # Compiled, or rounded by autocast, the features that come out are not those that the logits are made of.
        compiled = "torch._dynamo" in sys.modules  # which `set_stance` would import, for seconds
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), without_autocast(x.device):
            logits, features = student(x.detach().requires_grad_())
        maps = features[self.mapped]
        require(
            maps.ndim == 4 and maps.shape[2:].numel() > 1,
            lambda: (
                f"part: layer {self.mapped!r} gives {tuple(maps.shape[1:])}, but a map needs (C, H, W) with more than "
                "one pixel: name an earlier layer, as in part(layer=NAME)"
            ),
        )
        (grad,) = torch.autograd.grad(logits.max(1).values.sum(), maps)
        return (grad.mean((2, 3), keepdim=True) * maps.detach()).sum(1).relu()


def important(maps: Float[Tensor, "N h w"], shape: torch.Size) -> Bool[Tensor, "N channels H W"]:
    """Tell which pixels of images of a shape (N, C, H, W) their maps (N, h, w), each at least 0, mark as important.

    Returns:
        bool, (N, 3, H, W) for three channels, by the colour map, and (N, 1, H, W) else. A flat map marks all of
        blue, as in the authors' code, and without colours nothing.
    """
    lowest, highest = (f(maps, (1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    maps = (maps - lowest) / (highest - lowest).clamp_min(torch.finfo(maps.dtype).tiny)
    # With antialias, torch's bicubic filter is Pillow's, which the authors use.
    values = F.interpolate(maps[:, None], shape[2:], mode="bicubic", antialias=True).square()
    values = jet(values) if shape[1] == 3 else values
    std, mean = torch.std_mean(values, (1, 2, 3), correction=0, keepdim=True)
    return values - mean > std


def jet(values: Float[Tensor, "N 1 H W"]) -> Float[Tensor, "N 3 H W"]:
    """Colour values in [0, 1], (N, 1, H, W), from dark blue over green and yellow to dark red: matplotlib's `jet`."""
    v = values.clamp(0, 1)
    red = torch.minimum((v - 0.35) / 0.31, 1 - (v - 0.89) / 0.22)
    green = torch.minimum((v - 0.125) / 0.25, 1 - (v - 0.64) / 0.27)
    blue = torch.minimum(0.5 + v / 0.22, 1 - (v - 0.34) / 0.31)
    return torch.cat([red, green, blue], 1).clamp(0, 1)
