"""Mix-aware training: the robust network learns what it will be mixed with."""

from __future__ import annotations

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.models.mix import mixed
from advalign.objectives.contract import ADV, CLEAN, Need, Networks, Outputs, Term, Terms, Views
from advalign.objectives.method import Base
from advalign.shapes import ImageBatch, Labels, Logits


@final
class MixAware(Base):
    """TRADES on the mix m = log((1 - w) softmax(g / T) + w softmax(f)), g the vanilla model. After Bai et al. 2024.

    CE(m(x), y) + beta KL(m(x) || m(x')), ours on the mix of their paper; g is frozen. The attack maximises the KL to
    the mix's clean prediction, with gradient through both networks. f is what is saved; `advalign frontier` puts it
    back together with g.

    Raises:
        UserError: the weight is not inside (0, 1), the temperature not above 0, or beta negative.
    """

    name = "mixaware"
    supervises = ("clean",)
    GUEST_CLEAN, GUEST_ADV = Need("vanilla", "clean"), Need("vanilla", "adv")
    needs = (CLEAN, ADV, GUEST_CLEAN, GUEST_ADV)

    def __init__(self, weight: float = 0.8, temperature: float = 1.0, beta: float = 6.0) -> None:
        super().__init__()
        require(0 < weight < 1, lambda: f"mixaware: weight={weight:g} must be between 0 and 1")
        require(temperature > 0, lambda: f"mixaware: temperature={temperature:g} must be above 0")
        require(beta >= 0, lambda: f"mixaware: beta={beta:g} must be at least 0")
        self.weight, self.temperature, self.beta = weight, temperature, beta

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the KL divergence from the mix's clean prediction."""

        def mix(x: ImageBatch) -> Tensor:
            return self._mixed(nets["student"](x).logits, nets["vanilla"](x).logits)

        with torch.no_grad():
            clean = mix(views["clean"])
        return AttackLoss(mix, kl_divergence, clean, flat_at_clean=True)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return cross entropy of the mix on the clean images and the KL that ties the adversarial ones to them."""
        clean = self._mixed(outs[CLEAN].logits, outs[self.GUEST_CLEAN].logits)
        adv = self._mixed(outs[ADV].logits, outs[self.GUEST_ADV].logits)
        return {
            "clean": Term(1.0, F.cross_entropy(clean, y), supervises="clean"),
            "kl": Term(self.beta, kl_divergence(adv, clean).mean()),
        }

    def _mixed(self, student: Logits, vanilla: Logits) -> Logits:
        """Return the mix's log-probabilities, computed in float64, in the type of the losses."""
        mix = mixed(student, vanilla, self.weight, self.temperature)
        return mix.to(torch.promote_types(student.dtype, torch.float32))
