"""The guard against catastrophic overfitting: a network that learns to withstand the cheap attack alone.

Within a part of an epoch its accuracy under PGD falls to almost nothing, while the loss of the training looks better
than ever (Wong, Rice and Kolter 2020). The guard attacks held-out training images several times an epoch, keeps the
last good state, goes back to it when robust accuracy collapses, and makes the training attack stronger from there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import nn

from advalign.attacks import FGSM, PGD
from advalign.data import Images
from advalign.data.images import SPLIT_SEED, stratified_subset
from advalign.evaluation.accuracy import evaluate
from advalign.threats import Threat
from advalign.training.attacks import TrainingAttack
from advalign.training.recipes import Recipe

CHECKS = 3
"""Checks in an epoch, about."""
IMAGES = 128
"""Validation images that a check attacks."""
REMEDIES = (5, 10)
"""Steps of PGD that follow a collapse: the first that are more than the attack takes, then the next."""
FALL = 0.1
"""The least fall of robust accuracy that counts as a collapse; it must be by half, and beyond what chance does."""
GAP = 0.4
"""How far FGSM may leave more than PGD does, of a network that has not overfitted to single steps."""


@dataclass
class Seen:
    """Accuracies of a check."""

    robust: float
    """Under PGD-10."""
    one_step: float
    """Under FGSM."""


@dataclass
class Collapse:
    """That a training has lost its robustness, and has gone back."""

    epoch: float
    """Epochs done when it was noticed."""
    before: float
    """Robust accuracy before, the highest."""
    after: float
    back_to: float
    """Epochs done of the state that it has gone back to; `epoch` itself where none was good."""
    steps: int
    """Of PGD at least, from there."""


@dataclass
class Watch:
    """What the guard has seen: part of a training's state."""

    highest: float = 0.0
    """The highest robust accuracy so far, on its images."""
    accuracies: list[float] = field(default_factory=list)
    """Robust accuracies of the epoch under way."""
    collapses: list[Collapse] = field(default_factory=list)


class Guard:
    """Checks a student now and then.

    Args:
        remedies: steps of PGD that are left to take.
        steps: of an epoch.
        validation: the images that select the checkpoint, of which some are attacked.
    """

    def __init__(self, recipe: Recipe, remedies: tuple[int, ...], steps: int, validation: Images) -> None:
        self.recipe, self.remedies, self.every = recipe, remedies, math.ceil(steps / CHECKS)
        few = len(validation) <= IMAGES
        self.images = validation if few else stratified_subset(validation, IMAGES, SPLIT_SEED)
        self.chance = int(self.images.labels.bincount().max()) / len(self.images)
        self.fall = max(FALL, 3 * 0.5 / math.sqrt(len(self.images)))  # three standard errors at most

    def due(self, step: int, steps: int) -> bool:
        """Tell whether to check after so many steps of an epoch."""
        return step % self.every == 0 or step == steps

    def measure(self, student: nn.Module, threat: Threat) -> Seen:
        """Return the accuracies of a student, in eval mode.

        Args:
            threat: that of the training now, which may still grow.
        """
        attacks = FGSM(threat), PGD(threat, steps=10)
        seen = evaluate(student, self.images, attacks, precision=self.recipe.precision, seed=self.recipe.seed)
        one_step, robust = (seen.accuracies()[str(attack)] for attack in attacks)
        return Seen(robust, one_step)

    def collapsed(self, watch: Watch, seen: Seen) -> bool:
        """Tell whether robust accuracy has collapsed; if not, it counts.

        Only what lies above the share of the largest class counts: a network that always gives one answer withstands
        every attack on that class.
        """
        watch.accuracies.append(seen.robust)
        before, now = max(watch.highest - self.chance, 0.0), max(seen.robust - self.chance, 0.0)
        if (now < before / 2 and now < before - self.fall) or seen.one_step - seen.robust > GAP:
            return True
        watch.highest = max(watch.highest, seen.robust)
        return False


def is_guarded(recipe: Recipe, attack: TrainingAttack) -> bool:
    """Tell whether the guard watches trainings by a recipe: as it says, or else as the attack needs."""
    wanted = attack.guarded if recipe.guard is None else recipe.guard
    return wanted and bool(remedies_for(attack))


def remedies_for(attack: TrainingAttack) -> tuple[int, ...]:
    """Return the steps of PGD that are stronger than an attack, the weakest first."""
    return tuple(steps for steps in REMEDIES if steps > attack.passes)
