"""AdaAD's attack with IAD's loss: the student trusts the teacher where it is right, else itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import final

import torch
from torch import Tensor

from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.models.taps import Tapped
from advalign.objectives.bases.adaad import between_networks
from advalign.objectives.bases.iad import trust
from advalign.objectives.contract import ADV, CLEAN, Need, Networks, Outputs, Term, Terms, Views
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class AdaIAD(Base):
    """T^2 KL(softmax(t(x')/T) || softmax(f(x')/T)) + (1 - A) KL(f(x) || f(x')), A = t(x')[y]^power. Huang et al. 2023.

    The combination of AdaAD and IAD in Huang et al. 2023; t is the frozen robust teacher. The second term joins after
    the share `begin` of the epochs. A is a constant of each image; gradient flows through both sides of the second KL,
    f(x) included, as in the authors' code. The attack is AdaAD's.

    Raises:
        UserError: begin is not in [0, 1], power is negative, or the temperature is not above 0.
    """

    name = "adaiad"
    supervises = ()
    TEACHER = Need("robust", "adv")
    needs = (CLEAN, ADV, TEACHER)
    begun: Tensor

    def __init__(self, begin: float = 0.3, power: float = 0.1, temperature: float = 30.0) -> None:
        super().__init__()
        require(0 <= begin <= 1, lambda: f"adaiad: begin={begin:g} must be in [0, 1], a share of the epochs")
        require(power >= 0, lambda: f"adaiad: power={power:g} must be at least 0")
        require(temperature > 0, lambda: f"adaiad: temperature={temperature:g} must be above 0")
        self.begin, self.power, self.temperature = begin, power, temperature
        self.register_buffer("begun", torch.zeros(()))

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Note whether introspection has begun."""
        self.begun.fill_(progress >= self.begin)

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return AdaAD's: the KL divergence from the teacher's prediction of the same adversarial image."""
        return between_networks(nets, y)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the KL to the teacher and, weighted by the doubt in it, to the student's own clean prediction."""
        adv, teacher, t = outs[ADV].logits, outs[self.TEACHER].logits, self.temperature
        doubt = self.begun * (1 - trust(teacher, y, self.power))
        return {
            "soft_adv": Term(1.0, t**2 * kl_divergence(adv / t, teacher / t).mean()),
            "self": Term(1.0, (doubt * kl_divergence(adv, outs[CLEAN].logits)).mean()),
        }
