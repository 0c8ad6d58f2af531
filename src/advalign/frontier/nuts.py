"""MixedNUTS: the accurate network's decision mixed with the robust one's logits after a nonlinear transform.

Bai, Zhou, Patel and Sojoudi 2024 (TMLR, arXiv 2402.02263), section 5. The transform makes the robust network surer
where it is right, even under attack, than where it is wrong, so that less of it is given away for the same clean
accuracy. Scale, power, shift and weight are found without a gradient, on held-out images.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, final

import torch
from torch import Tensor, nn

from advalign.attacks.classification import classified
from advalign.attacks.losses import probability_margin
from advalign.frontier.dial import Setting
from advalign.frontier.evidence import CLEAN, Evidence
from advalign.frontier.members import Material
from advalign.frontier.mixing import Mixing, threshold, weight_above
from advalign.models.mix import transformed

SCALES = tuple(round(float(each), 6) for each in torch.logspace(-1.3, 0.7, 8))  # 0.05 to 5, as the authors' grid
POWERS = tuple(round(float(each), 6) for each in torch.linspace(1, 4, 8))
SHIFTS = tuple(round(float(each), 6) for each in torch.linspace(-2.5, 0, 12))  # theirs: -1.1 to 0 and -2.5 to -0.4


class Found(NamedTuple):
    """What the search has found."""

    transform: tuple[float, float, float]
    """Scale, power, shift."""
    at_bounds: tuple[str, ...]
    """Which of the three lie at the end of their grid."""
    useless: bool = False
    """Whether no transform of the grid qualifies, and the first was taken."""


@final
class MixedNuts(Mixing):
    """log((1 - w) [g's largest logit] + w softmax(M(h))), w from 0 to 1; M is found on the held-out images."""

    name = "mixednuts"
    found: Found | None = None

    def propose(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Find the transform, then settings whose guaranteed accuracy falls evenly."""
        self.found = self.search(held_out, give)
        self.transform = self.found.transform
        margins = self.margins(held_out)
        weights = [each for each in self.spaced_weights(margins, len(held_out), points, give) if each < 1]
        return [self.accurate, *(self.setting(each, 0.0) for each in weights), self.robust]

    def refine(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Return nothing: the search is over."""
        return []

    def search(self, held_out: Evidence, give: float) -> Found:
        """Return the transform under which fewest wrong decisions of the robust network are as sure as its right ones.

        For each, q is the margin that all but `give` points of the images keep that withstand. The robust network's
        wrong decisions of a smaller margin can be put right at the weight 1 / (1 + q). Of equal transforms the one of
        the largest q is taken, at which the weight is furthest from 1.
        """
        wrong = ~classified(held_out.logits(self.h, CLEAN), held_out.labels)
        given = int(give / 100 * len(held_out))
        best, best_rank = (SCALES[0], POWERS[0], SHIFTS[0]), (float("inf"), 0.0)
        for transform in itertools.product(SCALES, POWERS, SHIFTS):
            margins = self.margins(held_out, transform)
            certain = margins[margins > 0].sort().values
            if given >= len(certain):
                continue
            weight = weight_above(float(certain[given]))
            if weight == 1:
                continue
            kept = (_sureness(held_out.logits(self.h, CLEAN)[wrong], transform) > threshold(weight)).sum()
            if (rank := (float(kept), weight)) < best_rank:
                best, best_rank = transform, rank
        grids = {"scale": SCALES, "power": POWERS, "shift": SHIFTS}
        bounds = [name for (name, grid), value in zip(grids.items(), best, strict=True) if value in (grid[0], grid[-1])]
        return Found(best, tuple(bounds), useless=best_rank[0] == float("inf"))

    def warnings(self, held_out: Evidence) -> list[str]:
        """Say where the search found nothing, or ended at the end of its grid, beyond which a better one may lie."""
        if self.found is None:
            return []
        if self.found.useless:
            return [
                "no transform of the grid qualifies: --give allows for the loss of every image that withstands, or any "
                "weight below 1 loses more than it"
            ]
        if not self.found.at_bounds:
            return []
        values = ", ".join(f"{value:g}" for value in self.transform)
        return [f"the transform found ({values}) lies at the end of its grid in {', '.join(self.found.at_bounds)}"]

    def robust_views(self) -> dict[str, nn.Module]:
        """Return the robust network behind its transform, whose least margin is the one that counts."""
        scale, power, shift = self.transform
        name = f"robust network, transformed by {scale:g}, {power:g}, {shift:g}"
        return {name: Transformed(self.h, self.transform).eval()}


@final
class Transformed(nn.Module):
    """A network whose logits are transformed as in MixedNUTS."""

    def __init__(self, net: nn.Module, transform: tuple[float, ...]) -> None:
        super().__init__()
        self.net, self.transform = net, transform

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, K)."""
        return transformed_logits(self.net(x), self.transform)


@torch.fx.wrap
def transformed_logits(logits: Tensor, transform: tuple[float, ...]) -> Tensor:
    """Return M(z) in float64, as the mix computes it."""
    kind = torch.float32 if logits.device.type == "mps" else torch.float64
    return transformed(logits.to(kind), transform)


def mix_nuts(material: Material) -> MixedNuts:
    """MixedNUTS: mix the accurate network's decision with the robust one's transformed logits; two passes."""
    return MixedNuts(*material.two)


def _sureness(logits: Tensor, transform: tuple[float, ...]) -> Tensor:
    """Return (N,), by how much each image's largest probability exceeds the next."""
    logits = transformed(logits.double(), transform)
    return -probability_margin(logits, logits.argmax(1))
