"""Attacks as values: `parse("pgd(steps=20)", threat=Linf(8 / 255))(model, x, y) -> x_adv`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

from torch import Tensor, nn

from advalign.attacks.gradient import FGSM, MIM, PGD
from advalign.spelling import build, parse_call, spell
from advalign.threats import Threat

__all__ = ["ATTACKS", "FGSM", "MIM", "PGD", "STANDARD", "Attack", "parse", "spelled"]


class Attack(Protocol):
    """An attack maps images (N, C, H, W) in [0, 1] and labels (N,) to adversarial images inside its threat model."""

    name: ClassVar[str]

    @property
    def threat(self) -> Threat:
        """The threat model."""
        ...

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attack; the model is left as it was found."""
        ...


ATTACKS: dict[str, Callable[..., Attack]] = {"fgsm": FGSM, "pgd": PGD, "mim": MIM}
STANDARD = ("fgsm", "pgd(steps=20)", "mim(steps=20)", 'pgd(loss="margin", steps=100)')


def parse(spelling: str, *, threat: Threat) -> Attack:
    """Build the attack that a string such as `pgd(steps=20, step_size=2/255)` spells.

    Raises:
        UserError: unknown attack or argument, or a value out of range.
    """
    return build("attack", parse_call(spelling), ATTACKS, threat=threat)


def spelled(attack: Attack) -> str:
    """Return the canonical spelling of an attack, without its threat and never without its steps."""
    return spell(attack.name, type(attack), vars(attack), hidden="threat", always="steps")
