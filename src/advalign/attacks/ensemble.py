"""The worst case over several attacks, each on what the ones before have left; AutoAttack is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks.apgd import APGDCE, APGDT
from advalign.attacks.classification import misclassified
from advalign.attacks.contract import Attack
from advalign.attacks.fab import FABT
from advalign.attacks.gradient import attacking
from advalign.attacks.square import Square
from advalign.errors import require
from advalign.threats import Threat


@dataclass(frozen=True)
class Worst:
    """Several attacks in one threat model, cheapest first: an image that one of them fools is spared the others.

    Spelled `worst(apgd-ce, apgd-t, square)`.

    Raises:
        UserError: no attack, one that may leave the threat model, or another threat model.
    """

    name: ClassVar[str] = "worst"
    bounded: ClassVar[bool] = True
    threat: Threat
    members: tuple[Attack, ...]

    def __post_init__(self) -> None:
        require(bool(self.members), "worst: name at least one attack, as in worst(apgd-ce, square)")
        for member in self.members:
            require(
                member.bounded, f"worst: {member.name} may leave the threat model, so it is no part of a worst case"
            )
            require(member.threat == self.threat, f"worst: {member.name} attacks in {member.threat}, not {self.threat}")

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _one_after_another(self.members, model, x, y)


@dataclass(frozen=True)
class AutoAttack:
    """APGD on cross entropy, APGD on nine targets, FAB on nine targets, Square: the standard of Croce and Hein 2020.

    Each with the defaults of the authors' code: 100 steps, and 5,000 queries of Square; fewer are another attack.
    """

    name: ClassVar[str] = "autoattack"
    bounded: ClassVar[bool] = True
    threat: Threat

    @property
    def members(self) -> tuple[Attack, ...]:
        """The four attacks in their order."""
        return tuple(make(self.threat) for make in (APGDCE, APGDT, FABT, Square))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _one_after_another(self.members, model, x, y)


def _one_after_another(members: Sequence[Attack], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with attacking(model, x):
        x_adv = x.detach().clone()
        rows = torch.arange(len(x), device=x.device)
        for member in members:
            rows = rows[~misclassified(model, x_adv[rows], y[rows])]
            if not len(rows):
                break
            x_adv[rows] = member(model, x[rows], y[rows])
        return x_adv
