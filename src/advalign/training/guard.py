"""The guard against catastrophic overfitting: a network that learns to withstand the cheap attack alone.

Within a part of an epoch its accuracy under PGD falls to almost nothing, while the loss of the training looks better
than ever (Wong, Rice and Kolter 2020). The guard attacks held-out training images several times an epoch, keeps the
last good state, goes back to it when robust accuracy collapses, and makes the training attack stronger from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from advalign.attacks import PGD
from advalign.data import Images
from advalign.data.images import SPLIT_SEED, stratified_subset
from advalign.evaluation.accuracy import WORST_CASE, evaluate
from advalign.training.recipes import Recipe

CHECKS = 3
"""Checks in an epoch."""
IMAGES = 128
"""Validation images that a check attacks."""
REMEDIES = (5, 10)
"""Steps of PGD that follow a first collapse, and a second one."""
FALL = 0.1
"""The least fall that counts as a collapse, as a share of the images; and it must be by half."""


@dataclass
class Collapse:
    """That a training has lost its robustness, and has gone back."""

    epoch: float
    """Epochs done when it was noticed."""
    before: float
    """Robust accuracy before, the highest."""
    after: float
    back_to: float
    """Epochs done of the state that it has gone back to."""
    steps: int
    """Of PGD, from there."""


@dataclass
class Watch:
    """What the guard has seen: part of a training's state."""

    highest: float = 0.0
    """The highest robust accuracy so far, on its images."""
    accuracies: list[float] = field(default_factory=list)
    """Robust accuracies of the epoch under way."""
    collapses: list[Collapse] = field(default_factory=list)

    def collapsed(self, robust: float) -> bool:
        """Tell whether a robust accuracy is a collapse; if not, it counts."""
        self.accuracies.append(robust)
        if robust < self.highest / 2 and robust < self.highest - FALL:
            return True
        self.highest = max(self.highest, robust)
        return False


class Guard:
    """Checks a student now and then.

    Args:
        steps: of an epoch.
        validation: the images that select the checkpoint, of which some are attacked.
    """

    def __init__(self, recipe: Recipe, steps: int, validation: Images) -> None:
        self.recipe, self.every = recipe, math.ceil(steps / CHECKS)
        few = len(validation) <= IMAGES
        self.images = validation if few else stratified_subset(validation, IMAGES, SPLIT_SEED)

    def due(self, step: int, steps: int) -> bool:
        """Tell whether to check after so many steps of an epoch."""
        return step % self.every == 0 or step == steps

    def measure(self, student: nn.Module) -> float:
        """Return the accuracy of a student, in eval mode, under PGD-10."""
        attack = PGD(self.recipe.threat, steps=10)
        evaluation = evaluate(student, self.images, [attack], precision=self.recipe.precision, seed=self.recipe.seed)
        return evaluation.accuracies()[WORST_CASE]
