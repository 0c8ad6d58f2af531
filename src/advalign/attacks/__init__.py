"""Attacks as values: `parse("pgd(steps=20)", threat=Linf(8 / 255))(model, x, y) -> x_adv`."""

from __future__ import annotations

import re
from collections.abc import Callable

from advalign.attacks.apgd import APGDCE, APGDDLR, APGDT
from advalign.attacks.carlini_wagner import CarliniWagner
from advalign.attacks.contract import Attack
from advalign.attacks.ensemble import AutoAttack, Worst
from advalign.attacks.fab import FAB, FABT
from advalign.attacks.gradient import FGSM, MIM, PGD
from advalign.attacks.square import Square
from advalign.spelling import build, parse_call, spell
from advalign.threats import Threat

__all__ = [
    "APGDCE",
    "APGDDLR",
    "APGDT",
    "ATTACKS",
    "FAB",
    "FABT",
    "FGSM",
    "MIM",
    "PGD",
    "STANDARD",
    "Attack",
    "AutoAttack",
    "CarliniWagner",
    "Square",
    "Worst",
    "parse",
    "spelled",
]


ATTACKS: dict[str, Callable[..., Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "mim": MIM,
    "apgd-ce": APGDCE,
    "apgd-dlr": APGDDLR,
    "apgd-t": APGDT,
    "fab": FAB,
    "fab-t": FABT,
    "square": Square,
    "cw": CarliniWagner,
    "autoattack": AutoAttack,
}
STANDARD = ("fgsm", "pgd(steps=20)", "mim(steps=20)", 'pgd(loss="margin", steps=100)')


def parse(spelling: str, *, threat: Threat) -> Attack:
    """Build the attack that a string such as `pgd(steps=20, step_size=2/255)` spells.

    `worst(apgd-ce, apgd-t, square(queries=1000))` is the worst case of several, one after another.

    Raises:
        UserError: unknown attack or argument, or a value out of range.
    """
    inside = re.fullmatch(r"\s*worst\s*\((.*)\)\s*", spelling, re.DOTALL)
    if inside:
        members = [parse(each, threat=threat) for each in _members(inside[1])]
        worst = Worst(threat, tuple(members))
        return worst if len(members) > 1 else members[0]  # which can be told to go on after an image is fooled
    return build("attack", parse_call(spelling), ATTACKS, threat=threat)


def _members(text: str) -> list[str]:
    """Split at the commas that are not inside parentheses."""
    members, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            members.append("")
        else:
            members[-1] += letter
    return [member.strip() for member in members if member.strip()]


def spelled(attack: Attack) -> str:
    """Return the canonical spelling of an attack, without its threat and never without its steps or queries."""
    if isinstance(attack, Worst):
        return f"worst({', '.join(map(spelled, attack.members))})"
    always = "queries" if "queries" in vars(attack) else "steps"
    return spell(attack.name, type(attack), vars(attack), hidden="threat", always=always)
