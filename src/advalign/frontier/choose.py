"""The rule by which a setting is chosen, on held-out training images alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

RULE = "the highest clean accuracy at a robust accuracy at most {give:g} points below that of the robust network"


class Count(NamedTuple):
    """How many images a setting classifies correctly: the clean ones, and those that withstand every example shown."""

    clean: int
    robust: int


def choose(counts: Sequence[Count], images: int, give: float) -> int:
    """Return the number of the chosen setting; the last is the robust network, which always qualifies.

    Args:
        counts: of the settings, from the accurate network to the robust one, on the same images.
        images: how many these are.
        give: points of robust accuracy, per cent, that may be lost.
    """
    enough = counts[-1].robust - give / 100 * images
    # By rounding, 3 of 300 images are a little more than one point.
    admitted = [number for number, count in enumerate(counts) if count.robust >= enough - 1e-9]
    return max(admitted, key=lambda number: (counts[number].clean, counts[number].robust, number))


def front(counts: Sequence[Count], most: int) -> list[int]:
    """Return the numbers of the settings that no other beats in both accuracies, from the most accurate on.

    Of more than `most`, those whose robust accuracies come nearest to being evenly spaced, the first and last kept.
    """
    order = sorted(range(len(counts)), key=lambda number: (-counts[number].clean, -counts[number].robust))
    best: list[int] = []
    for number in order:
        if not best or counts[number].robust > counts[best[-1]].robust:
            best.append(number)
    if len(best) <= most:
        return best
    low, high = counts[best[0]].robust, counts[best[-1]].robust
    wanted = [low + (high - low) * k / (most - 1) for k in range(most)] if most > 1 else [high]
    nearest = (min(best, key=lambda number: abs(counts[number].robust - robust)) for robust in wanted)
    return list(dict.fromkeys(nearest))
