"""Adversarial images as a file of whole levels can hold them: rounded inside the threat model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.ensemble import Worst
from advalign.attacks.goal import Goal
from advalign.attacks.names import quantized_name
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels
from advalign.threats import L1, L2, Linf, Threat

BITS = 16
"""Bits at most."""


@dataclass(frozen=True)
class Quantized(Attack):
    """Another attack, whose images are rounded to whole levels before it is decided whether they fool.

    Attacks move pixels by any fraction of a level, but a file holds 8 bits a channel: some adversarial images do not
    survive being saved. Each pixel is rounded to the nearest level inside the threat model. In Linf that is at most the
    whole levels of the radius; in L2 and L1, where rounding may lengthen the perturbation beyond the radius, pixels
    that were rounded away from the clean image are rounded towards it instead, those that were rounded by most first,
    until the length fits. The images of an attack without a bound are rounded to the nearest level. Spelled
    `quantized(pgd(steps=20), bits=8)`.

    Raises:
        UserError: no attack, bits out of range, or clean images with values between two levels.
    """

    name: ClassVar[str] = "quantized"
    attack: Attack | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        require(self.attack is not None, "quantized: name an attack, as in quantized(pgd(steps=20), bits=8)")
        check_bits(self.bits)
        require(
            isinstance(self.threat, Linf | L2 | L1),
            lambda: f"quantized: the threat model is Linf, L2 or L1, not {self.threat}",
        )

    @property
    def inner(self) -> Attack:
        """The attack whose images are rounded."""
        assert self.attack is not None
        return self.attack

    # What it says of itself is what the attack inside says.
    @property
    def bounded(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] (of a class, there)
        """Whether it stays inside its threat model."""
        return self.inner.bounded

    @property
    def transfers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether its examples carry over to other models."""
        return self.inner.transfers

    @property
    def uses_gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether it asks the model for gradients."""
        return self.inner.uses_gradients

    def __str__(self) -> str:
        return quantized_name(str(self.inner), self.bits)

    def with_threat(self, threat: Threat) -> Attack:
        """Return the same attack in another threat model.

        Raises:
            UserError: it cannot attack in that one.
        """
        return Quantized(threat, self.inner.with_threat(threat), self.bits)

    @property
    def to_the_end(self) -> Attack:
        """The attack that goes on after an image is fooled, where it has the choice."""
        return Quantized(self.threat, self.inner.to_the_end, self.bits)

    def target_classes(self, model: nn.Module, x: ImageBatch, y: Labels) -> Labels | None:
        """Return the class (N,) to which the attack inside drives each image, if it does."""
        return self.inner.target_classes(model, x, y)

    @property
    def members(self) -> tuple[Attack, ...]:
        """The attacks that it consists of, each rounded by itself."""
        members = self.inner.members
        return tuple(Quantized(self.threat, each, self.bits) for each in members) if len(members) > 1 else (self,)

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        check_levels(x, self.bits)
        members = self.members
        if len(members) == 1:
            return rounded(self.inner(model, x, y), x, self.threat if self.bounded else None, self.bits)
        return attack_survivors(
            model, x, Goal(y), [lambda rows, member=member: member(model, x[rows], y[rows]) for member in members]
        )


def quantize(attack: Attack, bits: int) -> Attack:
    """Return the attack with its images rounded to so many bits; of a worst case, with those of each member.

    Raises:
        UserError: bits out of range.
    """
    if isinstance(attack, Worst):
        return Worst(attack.threat, tuple(quantize(member, bits) for member in attack.attacks))
    return Quantized(attack.threat, attack, bits)


def bits_of(attacks: Sequence[Attack]) -> set[int]:
    """Return the numbers of bits to which the attacks round their images."""
    return {each.bits for attack in attacks for each in (attack, *attack.members) if isinstance(each, Quantized)}


def check_bits(bits: int) -> None:
    """Refuse a number of bits out of range.

    Raises:
        UserError: it.
    """
    require(isinstance(bits, int) and 1 <= bits <= BITS, lambda: f"quantized: bits={bits} must be in 1 to {BITS}")


def check_levels(x: Tensor, bits: int) -> None:
    """Refuse clean images (N, C, H, W) with values between two levels: the rounding alone would move them.

    Raises:
        UserError: how many images have such values.
    """
    require_levels(between_levels(x, bits), len(x), bits)


def between_levels(x: Tensor, bits: int) -> int:
    """Return how many images have values between two levels."""
    scaled = x.detach().double() * (2**bits - 1)
    return int(((scaled - scaled.round()).abs().flatten(1).amax(1) > 0.01).sum()) if len(x) else 0


def require_levels(between: int, total: int, bits: int) -> None:
    """Refuse images of which some have values between two levels.

    Raises:
        UserError: how many of them.
    """
    require(
        between == 0,
        lambda: (
            f"quantized to {bits} bits: {between} of {total} clean images have values that are no multiples of "
            f"1/{2**bits - 1}; round them first"
        ),
    )


def rounded(x_adv: Tensor, x: Tensor, threat: Threat | None, bits: int) -> Tensor:
    """Return adversarial images (N, C, H, W) rounded to whole levels inside the threat model; None has no bound."""
    levels = 2**bits - 1
    exact = torch.promote_types(x_adv.dtype, torch.float32)
    clean = (x.to(exact) * levels).round()
    move = x_adv.to(exact) * levels - clean
    whole = (clean + move).round() - clean
    if isinstance(threat, Linf):
        limit = int(threat.eps * levels + 1e-4)  # 8/255 * 255 may come out below 8
        whole.clamp_(-limit, limit)
    elif threat is not None:
        power = 1 if isinstance(threat, L1) else 2
        whole = _shortened(whole, move, threat.eps * levels, power)
    return ((clean + whole) / torch.full((), levels, dtype=exact, device=x.device)).to(x_adv.dtype)


def _shortened(whole: Tensor, move: Tensor, radius: float, power: int) -> Tensor:
    """Return whole moves (N, ...) of length at most `radius`, to which moves that are no longer were rounded.

    Length is that of L1 or L2, by the power.

    Moves that were rounded away from 0 are rounded towards it instead, those that were rounded by most first, until the
    length fits; if all are, none is longer than it was.
    """
    size, turned = whole.abs().flatten(1), (whole.abs() - move.abs()).flatten(1)
    order = turned.argsort(1, descending=True)
    saves = torch.where(turned > 0, size**power - (size - 1) ** power, 0).gather(1, order)
    excess = (size**power).sum(1, keepdim=True) - radius**power
    needed = saves.cumsum(1) - saves < excess  # what those before save is not enough
    back = torch.zeros_like(size).scatter_(1, order, (needed & (saves > 0)).to(size.dtype)).view_as(whole)
    return whole - whole.sign() * back
