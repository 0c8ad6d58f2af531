"""Objectives: any base with any plug-ins. A new plug-in is a file in `plugins/` and a line in `PLUGINS`."""

from __future__ import annotations

from advalign.errors import UserError
from advalign.objectives.bases.alp import ALP
from advalign.objectives.bases.at import AT
from advalign.objectives.bases.hat import HAT
from advalign.objectives.bases.mart import MART
from advalign.objectives.bases.natural import Natural
from advalign.objectives.bases.trades import TRADES
from advalign.objectives.objective import Objective, compose, total
from advalign.objectives.parts import Base, Method, PlugIn
from advalign.objectives.plugins.bgat import BGAT
from advalign.objectives.plugins.kd import KD
from advalign.objectives.plugins.lbgat import LBGAT
from advalign.objectives.plugins.vfd import VFD
from advalign.spelling import build, parse_calls

__all__ = ["BASES", "PLUGINS", "Base", "Method", "Objective", "PlugIn", "as_method", "compose", "parse", "total"]

BASES: dict[str, type[Base]] = {
    "natural": Natural,
    "at": AT,
    "alp": ALP,
    "trades": TRADES,
    "mart": MART,
    "hat": HAT,
}
PLUGINS: dict[str, type[PlugIn]] = {"kd": KD, "bgat": BGAT, "lbgat": LBGAT, "vfd": VFD}


def as_method(given: str | Base | Method) -> Method:
    """Return the method that is spelled, or made of a base alone, or there already.

    Raises:
        UserError: as `parse`.
    """
    if isinstance(given, str):
        return parse(given)
    return given if isinstance(given, Method) else Method(given)


def parse(spelling: str) -> Method:
    """Build the method that a string such as `trades(beta=6)+vfd(weight=0.02)` spells.

    Raises:
        UserError: unknown base, plug-in or argument, a value out of range, or parts that make no sense together.
    """
    first, *others = parse_calls(spelling)
    if first.name in PLUGINS:
        raise UserError(f"{first.name!r} is a plug-in: put a base before it, as in 'trades+{first.name}'")
    method = Method(build("method", first, BASES))
    for call in others:
        if call.name in BASES:
            raise UserError(f"{call.name!r} is a base, and a method has one: only plug-ins follow a '+'")
        method = method + build("plug-in", call, PLUGINS)
    return method
