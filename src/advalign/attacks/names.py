"""What an outcome is called in records: `clean`, an attack's spelling, a worst case, transferred examples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class OutcomeName:
    """The name of an outcome, read once: `worst(fgsm, pgd(steps=20))`, `transfer(pgd(steps=20), from SURROGATE)`."""

    text: str
    members: tuple[str, ...]
    """Of a worst case: the names that it is over; else the name itself."""
    is_worst_case: bool = False
    attack: str = ""
    """The spelling of the attack, of transferred examples that of the one that made them; none of a worst case."""
    surrogate: str = ""
    """The label of the model on which transferred examples were made."""

    @property
    def surrogate_run(self) -> str:
        """The id of the surrogate's run, or the digest of its weights, with which a label ends."""
        return self.surrogate.rpartition(" ")[2]

    @property
    def of_transfer(self) -> bool:
        """Whether examples made on another model were shown, alone or as part of a worst case."""
        return any(name.surrogate for name in self._parts)

    @property
    def _parts(self) -> tuple[OutcomeName, ...]:
        return tuple(map(parse_name, self.members)) if self.is_worst_case else (self,)


@cache
def parse_name(text: str) -> OutcomeName:
    """Read the name of an outcome.

    Example:
        >>> parse_name("worst(fgsm, pgd(steps=20, restarts=2))").members
        ('fgsm', 'pgd(steps=20, restarts=2)')
    """
    inside = _inside(text, "worst")
    if inside is not None:
        return OutcomeName(text, split_names(inside) if inside.strip() else (), is_worst_case=True)
    inside = _inside(text, "transfer")
    if inside is None or ", from " not in inside:
        return OutcomeName(text, (text,), attack=text)
    attack, _, surrogate = inside.partition(", from ")
    return OutcomeName(text, (text,), attack=attack, surrogate=surrogate)


def worst_case_name(members: Iterable[str]) -> str:
    """Name the worst case over several outcomes."""
    return f"worst({', '.join(members)})"


def transfer_name(attack: str, surrogate: str) -> str:
    """Name the examples that an attack has made on a surrogate, whose label may hold the name of a file.

    Parentheses that do not match would make the name unreadable, and are left out of the label.
    """
    depth = 0
    for letter in surrogate:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
    label = surrogate if depth == 0 else surrogate.replace("(", "").replace(")", "")
    return f"transfer({attack}, from {label})"


def quantized_name(attack: str, bits: int) -> str:
    """Name an attack whose images are rounded to so many bits."""
    return f"quantized({attack}, bits={bits})"


def quantized_parts(text: str) -> tuple[str, str] | None:
    """Return the attack and the argument of `quantized(ATTACK, bits=8)`; None for another text.

    Example:
        >>> quantized_parts("quantized(pgd(steps=20, restarts=2), bits=8)")
        ('pgd(steps=20, restarts=2)', 'bits=8')
    """
    inside = _inside(text, "quantized")
    if inside is None:
        return None
    attack, *arguments = split_names(inside)
    return attack, ", ".join(arguments)


def worst_cases_among(names: Iterable[str]) -> list[str]:
    """Return the worst cases, that over most attacks first; those over transferred examples last."""
    worst = [name for name in map(parse_name, dict.fromkeys(names)) if name.is_worst_case]
    return [name.text for name in sorted(worst, key=lambda name: (name.of_transfer, -len(name.members), name.text))]


def split_names(text: str) -> tuple[str, ...]:
    """Split at the commas that are not inside parentheses; nothing between two of them is an empty name."""
    names, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            names.append("")
        else:
            names[-1] += letter
    return tuple(name.strip() for name in names)


def _inside(text: str, head: str) -> str | None:
    """Return what stands between the parentheses of `head(...)`, or None for another text."""
    name, bracket, rest = text.strip().partition("(")
    return rest[:-1] if bracket and name.strip() == head and rest.endswith(")") else None
