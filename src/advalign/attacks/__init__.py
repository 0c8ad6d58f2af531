"""Attacks as values: `parse("pgd(steps=20)", threat=Linf(8 / 255))(model, x, y) -> x_adv`."""

from __future__ import annotations

from advalign.attacks.apgd import APGDCE, APGDDLR, APGDT
from advalign.attacks.apgd_margin import APGDMargin
from advalign.attacks.carlini_wagner import CarliniWagner
from advalign.attacks.contract import Attack
from advalign.attacks.ensemble import AutoAttack, Fast, Worst
from advalign.attacks.fab import FAB, FABT
from advalign.attacks.gradient import FGSM, MIM, PGD
from advalign.attacks.min_margin import MinMargin
from advalign.attacks.minimum_norm import DDN, FMN
from advalign.attacks.names import parse_name, quantized_parts
from advalign.attacks.quantized import Quantized, quantize
from advalign.attacks.square import Square
from advalign.errors import quoted, require
from advalign.spelling import check_size, construct, parse_call
from advalign.threats import Threat

__all__ = [
    "APGDCE",
    "APGDDLR",
    "APGDT",
    "ATTACKS",
    "DDN",
    "FAB",
    "FABT",
    "FGSM",
    "FMN",
    "MIM",
    "PGD",
    "STANDARD",
    "APGDMargin",
    "Attack",
    "AutoAttack",
    "CarliniWagner",
    "Fast",
    "MinMargin",
    "Quantized",
    "Square",
    "Worst",
    "parse",
]


ATTACKS: dict[str, type[Attack]] = {
    "fgsm": FGSM,
    "pgd": PGD,
    "mim": MIM,
    "apgd-ce": APGDCE,
    "apgd-dlr": APGDDLR,
    "apgd-t": APGDT,
    "apgd-margin": APGDMargin,
    "min-margin": MinMargin,
    "fab": FAB,
    "fab-t": FABT,
    "square": Square,
    "cw": CarliniWagner,
    "ddn": DDN,
    "fmn": FMN,
    "autoattack": AutoAttack,
    "fast": Fast,
}
STANDARD = ("fgsm", "pgd(steps=20)", "mim(steps=20)", 'pgd(loss="margin", steps=100)')


def parse(spelling: str, *, threat: Threat) -> Attack:
    """Build the attack that a string such as `pgd(steps=20, step_size=2/255)` spells.

    `worst(apgd-ce, apgd-t, square(queries=1000))` is the worst case of several, one after another;
    `quantized(pgd(steps=20), bits=8)` rounds the images of one.

    Example:
        >>> import advalign as aa
        >>> attack = aa.attacks.parse("pgd(steps=20)", threat=aa.Linf(8 / 255))

    Raises:
        UserError: unknown attack or argument, or a value out of range.
    """
    check_size(spelling)
    name = parse_name(spelling)
    if name.is_worst_case:
        require(all(name.members), lambda: f"cannot read {quoted(spelling)}: an attack is missing beside a comma")
        members = [parse(each, threat=threat) for each in name.members]
        worst = Worst(threat, tuple(members))
        return worst if len(members) > 1 else members[0]  # one alone can go on after an image is fooled
    if quantized := quantized_parts(spelling):
        return quantize(parse(quantized[0], threat=threat), _bits(quantized[1], spelling))
    return construct("attack", parse_call(spelling), ATTACKS, threat=threat)


def _bits(argument: str, spelling: str) -> int:
    name, _, number = argument.partition("=") if argument else ("bits", "=", "8")
    fits = name.strip() == "bits" and number.strip().isdecimal()
    require(fits, lambda: f"cannot read {quoted(spelling)}: write it as in quantized(pgd(steps=20), bits=8)")
    return int(number)
