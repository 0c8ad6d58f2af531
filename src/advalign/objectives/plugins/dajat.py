"""DAJAT: strong augmentations are attacked beside the usual one, with norms of their own, and answered alike."""

from __future__ import annotations

from typing import final

from torch import nn

from advalign.data import AUGMENTATIONS
from advalign.errors import require, unknown
from advalign.models.augmentation_norm import with_augmentation_norms, with_first_norms
from advalign.objectives.contract import CLEAN, Outputs, Term, Terms
from advalign.objectives.distances import jensen_shannon
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels

LEAST = 1e-7
"""Of the mean prediction, as in the authors' code."""


@final
class DAJAT(PlugIn):
    """weight JS(p_0, ..., p_V) of the clean predictions of V + 1 augmentations, all attacked. Addepalli et al. 2022.

    The base's loss, as every other plug-in's, is the mean over all augmentations; on `trades` this is the paper's. The
    first augmentation is the recipe's, the others are by AutoAugment, through BatchNorms of their own; each
    augmentation is one batch to them. What is evaluated and saved has the first augmentation's norms. Adversarial
    weight perturbation (AWP) climbs the loss on the first augmentation alone.

    Args:
        weight: of the Jensen-Shannon divergence; gradient flows through all predictions.
        copies: V, the further augmentations of each image.
        augment: what makes them, as `--augment`.

    Raises:
        UserError: weight is negative, there are no copies, or no such augmentation; when bound, a network without
            BatchNorm.
    """

    name = "dajat"
    needs = (CLEAN,)
    replaces = frozenset({"norms"})
    weights_climb_first = True

    def __init__(self, weight: float = 2.0, copies: int = 2, augment: str = "autoaugment-first") -> None:
        super().__init__()
        require(weight >= 0, lambda: f"dajat: weight={weight:g} must be at least 0")
        require(copies >= 1, lambda: f"dajat: copies={copies} must be at least 1")
        if augment not in AUGMENTATIONS:
            raise unknown("augment of dajat", augment, AUGMENTATIONS)
        self.weight, self.copies, self.augment = weight, copies, augment
        self.augmentations, self.further_augment = 1 + copies, augment

    def adapt(self, student: nn.Module) -> nn.Module:
        """Give every BatchNorm a copy for the further augmentations."""
        return with_augmentation_norms(student)

    def restore(self, student: nn.Module) -> nn.Module:
        """Return a plain copy with the norms of the first augmentation."""
        return with_first_norms(student)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the divergence of the clean predictions of all augmentations."""
        log_ps = outs[CLEAN].logits.log_softmax(1).chunk(self.augmentations)
        return {"dajat": Term(self.weight, jensen_shannon(*log_ps, least=LEAST))}
