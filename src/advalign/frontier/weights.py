"""The dials in the space of weights: one network, whose weights are a mean of the weights of several.

Of a robust and an accurate network, as in WiSE-FT (Wortsman et al. 2022), or of several robust ones, a model soup
(Croce, Rebuffi, Shelhamer and Gowal 2023, arXiv 2302.10164). One forward pass, as before; no floor is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement, pairwise
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advalign.attacks.classification import classified, in_fp32
from advalign.data import Images
from advalign.errors import require
from advalign.frontier.choose import choose
from advalign.frontier.dial import Setting, count
from advalign.frontier.evidence import Evidence
from advalign.frontier.members import Material
from advalign.models.adapted import number_type
from advalign.models.norm_statistics import estimate_norm_statistics

STATISTICS_IMAGES = 10_000
"""Training images at most from which BatchNorm's statistics are estimated."""
_BATCH = 200
_COLLAPSE = 0.25
"""Of the way from chance to the less accurate end, the clean accuracy below which the middle counts as collapsed."""

Shares = tuple[float, ...]


@final
class WeightSpace:
    """theta = sum of s_i theta_i, with shares s_i of at least 0 that sum to 1.

    Args:
        name: as `--method` names it.
        nets: of one architecture, the robust one first, then the accurate one or further robust ones.
        statistics: clean training images, in an order of chance, from which BatchNorm's statistics are estimated for
            each mean; if None, they are averaged as the weights are, for networks that have the same.
        about: what every setting says beside the shares.
    """

    has_floor = False

    def __init__(
        self, name: str, nets: Sequence[nn.Module], statistics: Images | None, about: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self.nets, self.statistics, self.about = name, tuple(nets), statistics, dict(about or {})
        corners = torch.eye(len(nets)).tolist()
        self.robust, self.accurate = self.setting(tuple(corners[0])), self.setting(tuple(corners[1]))
        self._means: dict[Shares, nn.Module] = {}
        self._tried: list[Shares] = []

    def setting(self, shares: Shares) -> Setting:
        """Return the setting of shares: of a soup all of them, else the robust network's alone."""
        return Setting({"shares": shares} if self.name == "soup" else {**self.about, "share": shares[0]})

    def _shares(self, setting: Setting) -> Shares:
        share = setting.values.get("share")
        return tuple(setting.values["shares"]) if share is None else (share, round(1 - share, 4))

    def propose(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Return settings evenly spaced: on a line, or of three networks and more on a grid over all shares.

        Raises:
            UserError: fewer settings than networks.
        """
        require(points >= len(self.nets), lambda: f"points={points} must be at least {len(self.nets)}, the networks")
        self._tried = sorted(simplex(len(self.nets), points))
        return [self.setting(shares) for shares in self._tried]

    def refine(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Return the settings halfway from the one that would be chosen to its neighbours; none off a line."""
        if len(self.nets) > 2:
            return []
        counts = [count(self, self.setting(shares), held_out) for shares in self._tried]
        number = choose(counts, len(held_out), give)
        near = self._tried[max(number - 1, 0) : number + 2]
        middles = ((a[0] + b[0]) / 2 for a, b in pairwise(near))
        between = [_rounded([share, 1 - share]) for share in middles]
        self._tried = sorted({*self._tried, *between})
        return [self.setting(shares) for shares in between]

    def surrogates(self, setting: Setting) -> list[Setting]:
        """Return nothing: each setting is one network, whose gradient is its own."""
        return []

    def network(self, setting: Setting) -> nn.Module:
        """Return the network of a setting; of a share of 1, the very network that has it."""
        shares = self._shares(setting)
        if 1 in shares:
            return self.nets[shares.index(1)]
        if shares not in self._means:
            mean = mean_of_weights(self.nets, shares).eval()
            if self.statistics is not None:
                _estimate(mean, self.statistics)
            self._means[shares] = mean
        return self._means[shares]

    def correct(self, setting: Setting, evidence: Evidence, name: str) -> Tensor:
        """Return (N,) bool: which images of a set the network of a setting classifies as their labels."""
        return classified(evidence.logits(self.network(setting), name), evidence.labels)

    def floor(self, setting: Setting, evidence: Evidence) -> None:
        """Return None: what a mean of weights can lose cannot be told from one of the networks."""

    def robust_views(self) -> dict[str, nn.Module]:
        """Return nothing: the robust network is attacked as it is."""
        return {}

    def spelling(self, setting: Setting, robust: str, accurate: str) -> str:
        """Return the architecture that all have."""
        return robust

    def warnings(self, held_out: Evidence) -> list[str]:
        """Say that the networks lie in different basins of the loss, if means of them do little better than chance."""
        clean = {each: count(self, self.setting(each), held_out).clean / len(held_out) for each in self._tried}
        ends = [accuracy for shares, accuracy in clean.items() if 1 in shares]
        inside = {shares: accuracy for shares, accuracy in clean.items() if 1 not in shares}
        if not inside:
            return []
        worst = min(inside, key=inside.__getitem__)
        chance = float(held_out.labels.bincount().max()) / len(held_out)
        if min(ends) <= chance or inside[worst] >= chance + _COLLAPSE * (min(ends) - chance):
            return []
        return [
            f"the clean accuracy falls to {100 * inside[worst]:.1f} % at {self.setting(worst)}: the networks lie in "
            "different basins, which no line of weights connects. It works where one network began from the other, or "
            "all from one (--init, VFD with init=vanilla); mix their outputs instead, with --method mix"
        ]


def interpolate(material: Material) -> WeightSpace:
    """Average the weights of a robust and an accurate network of one architecture; one forward pass.

    Raises:
        UserError: they have two architectures; or no training images for BatchNorm's statistics.
    """
    _require_one_architecture("weights", material)
    return WeightSpace("weights", material.nets, _statistics_images(material))


def cook_soup(material: Material) -> WeightSpace:
    """Average the weights of several robust networks of one architecture; one forward pass.

    Raises:
        UserError: as `interpolate`.
    """
    _require_one_architecture("soup", material)
    return WeightSpace("soup", material.nets, _statistics_images(material))


def _require_one_architecture(method: str, material: Material) -> None:
    first, *others = material.members
    for other in others:
        require(
            other.model == first.model,
            lambda other=other: (
                f"method={method} takes networks of one architecture, not {first.model} and {other.model}: it is for "
                "runs of which one began from the other's weights, or all from the same; --method mix takes any two"
            ),
        )


def _statistics_images(material: Material) -> Images | None:
    """Return the images that BatchNorm's statistics are estimated from; None if there is no such norm."""
    has_norms = any(isinstance(module, _BatchNorm) for module in material.nets[0].modules())
    return draw_statistics_images(material.training) if has_norms else None


def simplex(networks: int, most: int) -> list[Shares]:
    """Return the shares of the finest even grid over the simplex with so many points at most, corners among them."""
    steps = max(n for n in range(1, most + 1) if n == 1 or math.comb(n + networks - 1, n) <= most)
    rows = combinations_with_replacement(range(networks), steps)
    return [_rounded([row.count(net) / steps for net in range(networks)]) for row in rows]


def _rounded(shares: Sequence[float]) -> Shares:
    """Return shares of four digits; the largest makes up for what is lost."""
    rounded = [round(share, 4) for share in shares]
    largest = rounded.index(max(rounded))
    rounded[largest] = round(rounded[largest] + 1 - sum(rounded), 4)
    return tuple(rounded)


@torch.no_grad()
def mean_of_weights(nets: Sequence[nn.Module], shares: Sequence[float]) -> nn.Module:
    """Return a copy of the first network whose weights and floating-point buffers are a mean of those of all.

    What all networks have in common stays as it is, to the bit; whole numbers are those of the first network.
    """
    mean = copy.deepcopy(nets[0])
    first, *others = (net.state_dict() for net in nets)
    for name, tensor in mean.state_dict().items():
        if tensor.is_floating_point():
            changes = (share * (other[name] - first[name]) for share, other in zip(shares[1:], others, strict=True))
            tensor.copy_(sum(changes, start=first[name]))  # not added in place: a tensor may have two names
    return mean


def draw_statistics_images(training: Images, seed: int = 0) -> Images:
    """Draw the training images that BatchNorm's statistics are estimated from, in an order of chance.

    Batches of one class, as files in order make them, would give too small a variance.
    """
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed), device="cpu")
    return training.take(order[:STATISTICS_IMAGES])


def _estimate(net: nn.Module, images: Images) -> None:
    """Estimate a network's BatchNorm statistics, everything else in eval mode, so that nothing is dropped out."""
    for module in net.modules():
        module.training = isinstance(module, _BatchNorm)
    size = min(_BATCH, len(images))
    kind = number_type(net)
    batches = (images.floats(slice(k, k + size)).to(kind) for k in range(0, len(images) // size * size, size))
    with in_fp32(images.labels.device):
        estimate_norm_statistics(net, batches)
    net.eval()
