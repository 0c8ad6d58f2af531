"""Objectives: any base with any plug-ins. A new plug-in is a file in `plugins/` and a line in `PLUGINS`."""

from __future__ import annotations

from advalign.errors import UserError
from advalign.objectives.bases.adaad import AdaAD
from advalign.objectives.bases.adaiad import AdaIAD
from advalign.objectives.bases.afa import LinearAFA
from advalign.objectives.bases.alp import ALP
from advalign.objectives.bases.ard import ARD
from advalign.objectives.bases.at import AT
from advalign.objectives.bases.contrast import Contrast
from advalign.objectives.bases.dkl import DKL
from advalign.objectives.bases.hat import HAT
from advalign.objectives.bases.iad import IAD
from advalign.objectives.bases.iad2 import IAD2
from advalign.objectives.bases.ikl import IKL
from advalign.objectives.bases.mart import MART
from advalign.objectives.bases.mixaware import MixAware
from advalign.objectives.bases.mtard import MTARD
from advalign.objectives.bases.natural import Natural
from advalign.objectives.bases.rslad import RSLAD
from advalign.objectives.bases.score import SCORE
from advalign.objectives.bases.trades import TRADES
from advalign.objectives.method import Base, Method, PlugIn
from advalign.objectives.objective import Objective, compose
from advalign.objectives.plugins.adaad import AdaADAttack
from advalign.objectives.plugins.adr import ADR
from advalign.objectives.plugins.afa import AFA
from advalign.objectives.plugins.ar_at import ARAT
from advalign.objectives.plugins.bgat import BGAT
from advalign.objectives.plugins.consistency import Consistency
from advalign.objectives.plugins.dajat import DAJAT
from advalign.objectives.plugins.generalist import Generalist
from advalign.objectives.plugins.igdm import IGDM
from advalign.objectives.plugins.kd import KD
from advalign.objectives.plugins.lbgat import LBGAT
from advalign.objectives.plugins.part import PART
from advalign.objectives.plugins.pgi import PGI
from advalign.objectives.plugins.qub import QUB
from advalign.objectives.plugins.rebat import ReBAT
from advalign.objectives.plugins.rpat import RPAT
from advalign.objectives.plugins.sglr import SGLR
from advalign.objectives.plugins.vfd import VFD
from advalign.objectives.terms import total
from advalign.spelling import check_numbers, construct, parse_calls

__all__ = [
    "BASES",
    "PLUGINS",
    "Base",
    "Method",
    "Objective",
    "PlugIn",
    "as_method",
    "compose",
    "parse",
    "total",
]

BASES: dict[str, type[Base]] = {
    "natural": Natural,
    "at": AT,
    "alp": ALP,
    "trades": TRADES,
    "mart": MART,
    "hat": HAT,
    "dkl": DKL,
    "ikl": IKL,
    "ard": ARD,
    "rslad": RSLAD,
    "iad": IAD,
    "iad2": IAD2,
    "adaad": AdaAD,
    "adaiad": AdaIAD,
    "mtard": MTARD,
    "mixaware": MixAware,
    "score": SCORE,
    "contrast": Contrast,
    "afa": LinearAFA,
}
PLUGINS: dict[str, type[PlugIn]] = {
    "kd": KD,
    "bgat": BGAT,
    "lbgat": LBGAT,
    "part": PART,
    "vfd": VFD,
    "ar-at": ARAT,
    "afa": AFA,
    "adr": ADR,
    "qub": QUB,
    "rpat": RPAT,
    "pgi": PGI,
    "rebat": ReBAT,
    "generalist": Generalist,
    "consistency": Consistency,
    "dajat": DAJAT,
    "sglr": SGLR,
    "igdm": IGDM,
    "adaad": AdaADAttack,
}


def as_method(method: str | Base | Method) -> Method:
    """Return a method from its spelling, or from a base alone, or as it is.

    Raises:
        UserError: as `parse`.
    """
    if isinstance(method, str):
        return parse(method)
    return method if isinstance(method, Method) else Method(method)


def parse(spelling: str) -> Method:
    """Build the method that a string such as `trades(beta=6)+vfd(weight=0.1)` spells.

    Example:
        >>> import advalign as aa
        >>> aa.parse("trades(beta=6)+vfd(weight=0.1)")
        Method(trades+vfd(weight=0.1))

    Raises:
        UserError: unknown base, plug-in or argument, a value out of range, or parts that make no sense together.
    """
    first, *others = calls = parse_calls(spelling)
    for call in calls:
        check_numbers(call.name, call.arguments)
    if first.name in PLUGINS and first.name not in BASES:
        raise UserError(f"{first.name!r} is a plug-in: put a base before it, as in 'trades+{first.name}'")
    method = Method(construct("method", first, BASES))
    for call in others:
        if call.name in BASES and call.name not in PLUGINS:
            raise UserError(f"{call.name!r} is a base, and a method has one: only plug-ins follow a '+'")
        method = method + construct("plug-in", call, PLUGINS)
    return method
