"""The worst case over several attacks, each on what the ones before have left; AutoAttack and its estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from advalign.attacks.apgd import APGDCE, APGDT
from advalign.attacks.apgd_margin import APGDMargin
from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.fab import FABT
from advalign.attacks.goal import Goal
from advalign.attacks.names import worst_case_name
from advalign.attacks.square import Square
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels
from advalign.threats import L1, Threat


@dataclass(frozen=True)
class Worst(Attack):
    """Several attacks in one threat model, cheapest first: an image that one of them fools is spared the others.

    Spelled `worst(apgd-ce, apgd-t, square)`.

    Raises:
        UserError: no attack, one that may leave the threat model, or another threat model.
    """

    name: ClassVar[str] = "worst"
    attacks: tuple[Attack, ...] = ()

    def __post_init__(self) -> None:
        require(bool(self.attacks), "worst: name at least one attack, as in worst(apgd-ce, square)")
        for member in self.attacks:
            require(
                member.bounded,
                lambda: f"worst: {member.name} may leave the threat model, so it is no part of a worst case",
            )
            require(
                member.threat == self.threat,
                lambda: f"worst: {member.name} attacks in {member.threat}, not {self.threat}",
            )

    def __str__(self) -> str:
        return worst_case_name(map(str, self.attacks))

    def with_threat(self, threat: Threat) -> Worst:
        """Return the worst case over the same attacks in another threat model.

        Raises:
            UserError: one of them cannot attack in that one.
        """
        return Worst(threat, tuple(attack.with_threat(threat) for attack in self.attacks))

    @property
    def members(self) -> tuple[Attack, ...]:
        """The attacks in their order."""
        return self.attacks

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _one_after_another(self.members, model, x, y)


@dataclass(frozen=True)
class AutoAttack(Attack):
    """APGD on cross entropy, APGD on nine targets, FAB on nine targets, Square: the standard of Croce and Hein 2020.

    Each with the defaults of the authors' code: 100 steps, and 5,000 queries of Square; fewer are another attack. In L1
    these are five restarts of APGD on cross entropy, and five targets of APGD (Croce and Hein 2021).
    """

    name: ClassVar[str] = "autoattack"
    benchmark: ClassVar[str] = "RobustBench"

    @property
    def members(self) -> tuple[Attack, ...]:
        """The four attacks in their order."""
        if isinstance(self.threat, L1):
            return (
                APGDCE(self.threat, restarts=5),
                APGDT(self.threat, targets=5),
                FABT(self.threat),
                Square(self.threat),
            )
        return tuple(make(self.threat) for make in (APGDCE, APGDT, FABT, Square))

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _one_after_another(self.members, model, x, y)


@dataclass(frozen=True)
class Fast(Attack):
    """An estimate of `autoattack` for research: APGD on cross entropy, then on nine logit margins from two starts each.

    100 steps on the cross entropy and 40 on each margin, less than a fifth of the passes of AutoAttack. It is not
    AutoAttack, and has neither FAB nor Square, so masked gradients escape it: report `autoattack`.
    """

    name: ClassVar[str] = "fast"
    remark: ClassVar[str] = "an estimate of autoattack for use during research, not to be reported in its place"

    @property
    def members(self) -> tuple[Attack, ...]:
        """The three attacks in their order."""
        return (APGDCE(self.threat), APGDMargin(self.threat), APGDMargin(self.threat, start="odi"))

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return _one_after_another(self.members, model, x, y)


def _one_after_another(members: Sequence[Attack], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def attempt(member: Attack, rows: Tensor) -> Tensor:
        return member(model, x[rows], y[rows])

    return attack_survivors(model, x, Goal(y), [partial(attempt, member) for member in members])
