"""Adversarial feature alignment, joined to a base: features gather by class, adversarial ones as well."""

from __future__ import annotations

from typing import Literal, final

from torch import nn

from advalign.attacks.ascent import AttackLoss
from advalign.errors import require
from advalign.objectives.bases.contrast import Contrast
from advalign.objectives.contract import ADV, CLEAN, SECOND, Networks, Outputs, Term, Terms, Views
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class AFA(PlugIn):
    """weight L_AFA(x', x, second view of x): the supervised contrast of `contrast`, beside any base. Park et al. 2024.

    Needs each batch in two augmentations; one more student pass, on the second.

    Args:
        weight: mu. The paper's is unknown to us; .1, .5 and 1 are the ones to try.
        temperature: of the contrast.
        attack: `base` makes one x' by the base's attack; `contrast` maximises L_AFA, as AFA does alone.

    Raises:
        UserError: weight is negative, or the temperature not above 0.
    """

    name = "afa"
    needs = (CLEAN, SECOND, ADV)

    def __init__(
        self, weight: float = 0.5, temperature: float = 0.1, attack: Literal["base", "contrast"] = "base"
    ) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"afa: weight={weight:g} must be at least 0")
        require(temperature > 0, lambda: f"afa: temperature={temperature:g} must be above 0")
        self.weight, self.temperature, self.attack = weight, temperature, attack
        self.contrast = Contrast(temperature)
        self.replaces = frozenset({"attack_loss"}) if attack == "contrast" else frozenset()

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the penultimate layer."""
        return self.contrast.layers(student)

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the contrast, which the attack maximises in place of the base's loss."""
        return self.contrast.attack_loss(nets, views, y)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the contrast."""
        return {"afa": Term(self.weight, self.contrast.loss(outs, y))}
