"""Attacks as the user lists them: spellings, words that stand for several or for none, and classes in their files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from advalign.attacks import ATTACKS, STANDARD, Attack, parse
from advalign.attacks.names import parse_name, quantized_parts, worst_case_name
from advalign.errors import require, unknown
from advalign.spelling import check_size
from advalign.threats import Threat

WORDS = {
    "worst(ATTACK, ...)": "The worst case over several, each run on the images that withstand those before.",
    "quantized(ATTACK, bits=8)": "Another attack, whose images are rounded to 8 bits before it is decided whether they "
    "fool.",
    "standard": f"= {' '.join(STANDARD)}",
}
"""What stands for several attacks, with a line of description."""
_NOTHING = ("clean", "none")
RESERVED = ("worst", "quantized", "transfer", "standard", *_NOTHING)
"""Words with a meaning on the command line or in records, by which no attack may be called."""


def parse_attacks(names: Iterable[str], threat: Threat) -> list[Attack]:
    """Return the attacks of these spellings, each once; `standard` stands for several, `none` and `clean` for none.

    Raises:
        UserError: unknown attack or argument, or a value out of range.
    """
    attacks: dict[str, Attack] = {}
    for spelling in (each for name in names for each in (STANDARD if name == "standard" else (name,))):
        head, arguments = _split(spelling)
        head = head.replace("_", "-")
        if head in _NOTHING and not arguments:
            continue
        known = [*ATTACKS, "worst", "quantized"]
        if head not in known:
            raise unknown("attack", head, [*known, "standard", "none"])
        require(head != "worst" or bool(arguments), "worst needs attacks, as in 'worst(apgd-ce, square)'")
        require(head != "quantized" or bool(arguments), "quantized needs an attack, as in 'quantized(pgd, bits=8)'")
        attack = parse(spelling, threat=threat)
        attacks.setdefault(str(attack), attack)
    return list(attacks.values())


def rename_attacks(spelling: str, rename: Callable[[str], str]) -> str:
    """Return the spelling of an attack with another name in front of its arguments; of a worst case, of each member.

    Raises:
        UserError: the text is too long or nested too deeply to be a spelling.
    """
    check_size(spelling)
    name = parse_name(spelling)
    if name.is_worst_case:
        return worst_case_name(rename_attacks(member, rename) for member in name.members)
    if quantized := quantized_parts(spelling):
        attack, bits = quantized
        return f"quantized({', '.join(filter(None, (rename_attacks(attack, rename), bits)))})"
    head, arguments = _split(spelling)
    return f"{rename(head)}{arguments}"


def benchmark_of(spelling: str) -> str:
    """Return the public benchmark that compares models by an attack as it is spelled; empty if there is none."""
    return ATTACKS[spelling].benchmark if spelling in ATTACKS else ""


def remarks_on(spellings: Iterable[str]) -> dict[str, str]:
    """Return what a table must say of some attacks, alone or as members of others, by their names."""
    texts = list(spellings)
    return {
        name: attack.remark
        for name, attack in ATTACKS.items()
        if attack.remark and any(re.search(rf"(^|[\s,(]){name}($|[,)(])", text) for text in texts)
    }


def looks_for_the_nearest(spelling: str, norm: str) -> bool:
    """Tell whether the attack that a text spells looks for the nearest adversary in a norm."""
    head, _ = _split(spelling)
    return head in ATTACKS and norm in ATTACKS[head].nearest


def _split(spelling: str) -> tuple[str, str]:
    """Split a spelling into the attack's name and its arguments with their parentheses."""
    head, bracket, arguments = spelling.partition("(")
    return head.strip(), bracket + arguments
