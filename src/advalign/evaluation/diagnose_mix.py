"""What only a mix can hide: a member that an attack on the whole does not see. See `advalign.models.mix`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks import PGD, Attack, MinMargin
from advalign.attacks.classification import classified, in_fp32
from advalign.attacks.losses import probability_margin
from advalign.evaluation.checks import USUAL, Verdict, check_floor, check_members
from advalign.models.adapted import adapted
from advalign.models.mix import Mix, transformed
from advalign.models.modes import evaluating
from advalign.threats import L2, Linf

Withstand = Callable[[str, Attack, Tensor | None], Tensor]
"""Name of the step, attack, and (N,) bool, which images to attack; returns (N,) bool, which of them withstand."""


@dataclass(frozen=True)
class FromMember(Attack):
    """Examples that another attack makes on a member of the mix, to its last step."""

    name: ClassVar[str] = "from-member"
    uses_gradients: ClassVar[bool] = False
    member: nn.Module | None = None
    attack: Attack | None = None

    def run(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial images of the member; the mix is not used."""
        assert self.member is not None
        assert self.attack is not None
        return self.attack.to_the_end(self.member, x, y)


def mix_verdicts(
    mix: Mix, x: Tensor, y: Tensor, threat: Linf | L2, white: Tensor, withstand: Withstand
) -> list[Verdict]:
    """Check a mix against examples made on its members, and against what its robust member alone guarantees.

    Args:
        x: images (N, C, H, W) in [0, 1].
        y: (N,) their labels.
        white: (N,) bool, which images withstand the attacks on the mix.
    """
    least = MinMargin(threat, steps=USUAL, targets=3)
    kept = white.clone()
    for name, member, attack in (
        ("robust member", mix.robust, least),
        ("robust member, to the end", mix.robust, PGD(threat, steps=USUAL, loss="margin")),
        ("accurate member", mix.accurate, PGD(threat, steps=USUAL, loss="margin")),
    ):
        kept &= withstand(name, FromMember(threat, member, attack), white)
    verdicts = [check_members(white, kept)]
    if mix.weight:
        certain = _certain(mix, least, x, y) & kept
        verdicts.append(check_floor(kept, certain, _alone(mix.accurate, PGD(threat, steps=USUAL, loss="margin"), x, y)))
    return verdicts


def _certain(mix: Mix, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """Return (N,) bool: images that the mix would keep whatever stood in the accurate member's place."""
    net, result = adapted(mix.robust), []
    transform = mix.transform if mix.weight < 1 else ()
    with evaluating(mix.robust), in_fp32(x.device):
        for part, labels in zip(x.split(512), y.split(512), strict=True):
            x_adv = attack(net, part, labels)
            with torch.no_grad():
                margins = [-probability_margin(transformed(net(each), transform), labels) for each in (part, x_adv)]
            result.append(torch.stack(margins).amin(0) > (1 - mix.weight) / mix.weight)
    return torch.cat(result)


def _alone(net: nn.Module, attack: Attack, x: Tensor, y: Tensor) -> Tensor:
    """Return (N,) bool: the images that a member by itself keeps under an attack on itself."""
    network = adapted(net)
    with evaluating(net), in_fp32(x.device):
        x_adv = torch.cat([attack(network, *part) for part in zip(x.split(512), y.split(512), strict=True)])
        with torch.no_grad():
            return torch.cat(
                [classified(network(part), y_) for part, y_ in zip(x_adv.split(512), y.split(512), strict=True)]
            )
