"""The dial of output mixing: how much of the accurate network's probabilities, and how sharp they are.

Bai, Anderson, Kim and Sojoudi 2024 (SIMODS, arXiv 2301.12554). What a mix can lose is known from the robust network
alone: where its margin of probabilities m(x') exceeds (1 - w) / w at every x' of the ball, the mix predicts the true
class whatever the accurate network says, since mix_y - mix_k >= -(1 - w) + w m.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from advalign.attacks.classification import classified
from advalign.attacks.losses import probability_margin
from advalign.frontier.choose import choose, front
from advalign.frontier.dial import Setting, count
from advalign.frontier.evidence import CLEAN, Evidence
from advalign.frontier.members import Material
from advalign.models.mix import Mix, mixed, transformed
from advalign.spelling import spell

TEMPERATURES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)
BLUNT = (1.0, 5.0)
"""Temperatures of the mixes that are attacked in place of sharper ones as well."""
WEIGHTS = (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 0.995, 0.998)


class Mixing:
    """log((1 - w) softmax(g / T) + w softmax(M(h))), w from 0 to 1; T is chosen for each w."""

    name = "mix"
    accurate = Setting({"weight": 0.0})
    robust = Setting({"weight": 1.0})
    has_floor = True

    def __init__(self, robust: nn.Module, accurate: nn.Module, transform: Sequence[float] = ()) -> None:
        self.h, self.g, self.transform = robust, accurate, tuple(transform)

    def propose(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Return settings whose guaranteed accuracy falls evenly from the robust network's to nothing.

        One of them is certain to lose no more than what may be given. The temperature is that of the highest clean
        accuracy on the held-out images; the guarantee does not depend on it.
        """
        weights = self.spaced_weights(self.margins(held_out), len(held_out), points, give)
        return [self.accurate, *(self._sharpest(held_out, each) for each in weights if each < 1), self.robust]

    def spaced_weights(self, margins: Tensor, images: int, points: int, give: float) -> list[float]:
        """Return weights at which evenly spaced shares of the images are certain, and that which gives `give` points.

        Args:
            margins: (N,), the least found of each image.
        """
        certain = margins[margins > 0].sort().values.tolist()
        ranks = {int(give / 100 * images), *(len(certain) * k // (points - 1) for k in range(1, points - 1))}
        return sorted({weight_above(certain[rank]) for rank in ranks if rank < len(certain)})

    def refine(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Return the best settings of a grid of weights and temperatures, as far as the examples so far can tell.

        A blunt accurate network cannot do all that the guarantee allows for, so that less of the robust one may do.
        """
        grid = [self.setting(weight, temperature) for weight in WEIGHTS for temperature in TEMPERATURES]
        counts = [count(self, each, held_out) for each in (*grid, self.robust)]
        best = [*front(counts, points), choose(counts, len(held_out), give)]
        return [grid[number] for number in dict.fromkeys(best) if number < len(grid)]

    def _sharpest(self, held_out: Evidence, weight: float) -> Setting:
        settings = [self.setting(weight, temperature) for temperature in TEMPERATURES]
        accuracy = [int(self.correct(each, held_out, CLEAN).sum()) for each in settings]
        best = [each for each, right in zip(settings, accuracy, strict=True) if right == max(accuracy)]
        return min(best, key=lambda each: abs(each.values["temperature"] - 1))  # the least change of equals

    def setting(self, weight: float, temperature: float) -> Setting:
        """Return the setting of a weight and a temperature."""
        transform = {"transform": self.transform} if self.transform else {}
        return Setting({"weight": weight, "temperature": temperature, **transform})

    def surrogates(self, setting: Setting) -> list[Setting]:
        """Return the same weight with a blunter accurate network: a sharp one is flat where it is sure."""
        weight, temperature = setting.values["weight"], setting.values.get("temperature", 1.0)
        if weight in (0, 1) or temperature >= 1:
            return []
        return [self.setting(weight, each) for each in BLUNT]

    def network(self, setting: Setting) -> nn.Module:
        """Return the mix of a setting."""
        return Mix(self.h, self.g, **setting.values).eval()

    def correct(self, setting: Setting, evidence: Evidence, name: str) -> Tensor:
        """Return (N,) bool: which images of a set the mix classifies as their labels."""
        weight = setting.values["weight"]
        if weight in (0, 1):
            return classified(evidence.logits(self.h if weight else self.g, name), evidence.labels)
        h, g = evidence.logits(self.h, name), evidence.logits(self.g, name)
        return classified(mixed(h, g, **setting.values), evidence.labels)

    def floor(self, setting: Setting, evidence: Evidence) -> Tensor:
        """Return (N,) bool: images whose least margin found is larger than any other network could make up for."""
        weight = setting.values["weight"]
        if weight == 0:
            return torch.zeros(len(evidence), dtype=torch.bool)
        transform = setting.values.get("transform", ())
        return self.margins(evidence, transform if weight < 1 else ()) > threshold(weight)

    def margins(self, evidence: Evidence, transform: Sequence[float] | None = None) -> Tensor:
        """Return (N,), of each image the least margin of the robust network's probabilities in any set."""
        transform = self.transform if transform is None else transform
        return torch.stack([self._margin(evidence, name, transform) for name in evidence.sets]).amin(0)

    def _margin(self, evidence: Evidence, name: str, transform: Sequence[float]) -> Tensor:
        return -probability_margin(transformed(evidence.logits(self.h, name).double(), transform), evidence.labels)

    def robust_views(self) -> dict[str, nn.Module]:
        """Return no other form of the robust network."""
        return {}

    def spelling(self, setting: Setting, robust: str, accurate: str) -> str:
        """Spell the mix as a model."""
        return spell_mix(robust, accurate, setting)

    def warnings(self, held_out: Evidence) -> list[str]:
        """Return nothing."""
        return []


def mix(material: Material) -> Mixing:
    """Mix probabilities of an accurate and a robust network, (1 - w) softmax(g / T) + w softmax(h); two passes."""
    return Mixing(*material.two)


def threshold(weight: float) -> float:
    """Return (1 - w) / w: the margin of the robust network that the accurate one can make up for at most."""
    return (1 - weight) / weight


def weight_above(margin: float) -> float:
    """Return the weight at which a margin just suffices, to four digits, rounded to the robust side."""
    exact = 1 / (1 + margin)
    digits = 4 if exact < 0.99 else 6
    return min(1.0, int(exact * 10**digits + 1) / 10**digits)


def spell_mix(robust: str, accurate: str, setting: Setting) -> str:
    """Spell the network of a setting, as `advalign.models.build` reads it."""
    return spell("mix", Mix, {"robust": robust, "accurate": accurate, **setting.values})
