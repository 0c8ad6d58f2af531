"""AdaAD's attack for any distillation base: it looks for where student and teacher differ."""

from __future__ import annotations

from typing import final

from advalign.attacks.ascent import AttackLoss
from advalign.errors import require
from advalign.objectives.bases.adaad import AdaAD, between_networks
from advalign.objectives.bases.adaiad import AdaIAD
from advalign.objectives.contract import Networks, Outputs, Terms, Views
from advalign.objectives.method import Base, PlugIn
from advalign.shapes import Labels


@final
class AdaADAttack(PlugIn):
    """The attack maximises KL(t(x') || f(x')), with gradient through both networks; the loss stays. Huang et al. 2023.

    t is the robust teacher of the base, which each step of the attack runs forward and backward. `adaad` and `adaiad`
    are bases that have this attack with losses of their own.
    """

    name = "adaad"
    replaces = frozenset({"attack_loss"})
    needs = ()

    def joins(self, base: Base) -> None:
        """Refuse a base without a robust teacher, or with this attack."""
        require(
            any(need.net == "robust" for need in base.needs),
            lambda: f"{base}+adaad: its attack asks a robust teacher, and {base} has none",
        )
        require(not isinstance(base, AdaAD | AdaIAD), lambda: f"{base}+adaad: {base} has this attack itself")

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the KL divergence from the teacher's prediction of the same adversarial image."""
        return between_networks(nets, y)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return nothing: the base's loss is taken as it is, on other examples."""
        return {}
