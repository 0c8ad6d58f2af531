"""AFA's first stage: a feature extractor trained by a supervised contrast in a min-max loop."""

from __future__ import annotations

import copy
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advalign.attacks.ascent import AttackLoss
from advalign.errors import require
from advalign.models import Output, last_linear
from advalign.objectives.contract import ADV, CLEAN, SECOND, Networks, Outputs, Term, Terms, TrainingAttack, Views
from advalign.objectives.distances import supervised_contrast
from advalign.objectives.method import Base
from advalign.runtime import ranks
from advalign.shapes import Labels


@final
class Contrast(Base):
    """L_AFA(x', x, second view of x) on penultimate features, for `afa`'s linear layer. Park et al. 2024.

    Anchors are the adversarial features; each is compared with the clean features of both views and with the other
    adversarial ones, those of its class are its positives. All features are unit vectors, and all carry gradient. The
    attack maximises the same contrast, with the clean features of both views as constants.

    The last linear layer learns beside by cross entropy on the clean features, from which no gradient goes back: a
    probe, so that the extractor can be validated.

    Raises:
        UserError: the temperature is not above 0.
    """

    name = "contrast"
    supervises = ("clean",)
    standalone_reason = "is the first stage of afa"
    training_attack = TrainingAttack(start="uniform")
    needs = (CLEAN, SECOND, ADV)

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        require(temperature > 0, lambda: f"contrast: temperature={temperature:g} must be above 0")
        self.temperature = temperature

    def adapt(self, student: nn.Module) -> nn.Module:
        """Keep the gradient of the probe from the extractor."""
        last_linear(student).register_forward_pre_hook(_detached)
        return student

    def restore(self, student: nn.Module) -> nn.Module:
        """Return a copy whose last layer sends gradient to the extractor again."""
        student = copy.deepcopy(student)
        hooks = last_linear(student)._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _detached]:
            del hooks[key]
        return student

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the penultimate layer."""
        return ("penultimate",)

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the contrast of the adversarial features with the clean ones of both views."""
        student = nets["student"]
        with torch.no_grad():
            clean = torch.cat([ranks.gather(_unit(student(views[view]))) for view in ("clean", "second")])
        twice = ranks.gather(y).repeat(2)
        return AttackLoss(
            lambda x_adv: _unit(student(x_adv)),
            lambda u, y: supervised_contrast(u, y, clean, twice, self.temperature),
            y,
        )

    def loss(self, outs: Outputs, y: Labels) -> Tensor:
        """Return L_AFA, a scalar."""
        clean, second, adv = (_unit(outs[need]) for need in (CLEAN, SECOND, ADV))
        others, labels = torch.cat([ranks.gather(each) for each in (clean, second, adv)]), ranks.gather(y).repeat(3)
        itself = ranks.places(len(y), y.device) + 2 * ranks.whole(len(y))
        return supervised_contrast(adv, y, others, labels, self.temperature, left_out=itself).mean()

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the contrast, and the probe's cross entropy."""
        return {
            "contrast": Term(1.0, self.loss(outs, y)),
            "probe": Term(1.0, F.cross_entropy(outs[CLEAN].logits, y), supervises="clean"),
        }


def _unit(out: Output) -> Tensor:
    return F.normalize(out.features["penultimate"].flatten(1))


def _detached(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.detach() for arg in args) if layer.training else args  # attacks on the probe run in eval mode
