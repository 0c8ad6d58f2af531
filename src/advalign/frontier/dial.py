"""What can be set between a robust and an accurate network, and the network at each setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from advalign.frontier.choose import Count
from advalign.frontier.evidence import CLEAN, Evidence
from advalign.spelling import spell_arguments


@dataclass(frozen=True)
class Setting:
    """A setting of the dial: the arguments that make its network."""

    values: Mapping[str, Any]

    def __str__(self) -> str:
        return spell_arguments(self.values)


class Dial(Protocol):
    """A way to go from the accurate network to the robust one."""

    name: str
    """As `--method` names it."""
    accurate: Setting
    """The end at which the network is the accurate one, or nearest to it."""
    robust: Setting
    """The end at which it is the robust one."""
    has_floor: bool
    """Whether the robust network alone tells what a setting cannot lose."""

    def propose(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Return so many settings at most from the accurate end to the robust one, both ends among them.

        Args:
            held_out: images that neither network was trained on, with examples made on the robust network and on the
                accurate one.
            give: points of robust accuracy, per cent, that the setting to be chosen may lose.
        """
        ...

    def refine(self, held_out: Evidence, points: int, give: float) -> list[Setting]:
        """Return further settings worth an attack, so many at most, now that those proposed have been attacked."""
        ...

    def surrogates(self, setting: Setting) -> list[Setting]:
        """Return settings to be attacked beside one whose own gradient may be hidden."""
        ...

    def network(self, setting: Setting) -> nn.Module:
        """Return the network of a setting, in eval mode; it maps images (N, C, H, W) in [0, 1] to logits (N, K)."""
        ...

    def correct(self, setting: Setting, evidence: Evidence, name: str) -> Tensor:
        """Return (N,) bool: which images of a set are classified as their labels at a setting."""
        ...

    def floor(self, setting: Setting, evidence: Evidence) -> Tensor | None:
        """Return (N,) bool: images that no network in the accurate one's place could lose; None if none is known."""
        ...

    def robust_views(self) -> Mapping[str, nn.Module]:
        """Return forms of the robust network that are known once settings are proposed, to be attacked alone."""
        ...

    def spelling(self, setting: Setting, robust: str, accurate: str) -> str:
        """Return how the setting's network is spelled, given the spellings of the two."""
        ...

    def warnings(self, held_out: Evidence) -> list[str]:
        """Say what the user should know of the settings tried, a line each."""
        ...


def count(dial: Dial, setting: Setting, evidence: Evidence) -> Count:
    """Count the images that a setting classifies correctly: the clean ones, and those right in all sets."""
    right = {name: dial.correct(setting, evidence, name) for name in evidence.sets}
    return Count(int(right[CLEAN].sum()), int(evidence.withstand(right.__getitem__).sum()))
