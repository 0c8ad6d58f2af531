"""A method: a base and its plug-ins, not yet bound to networks. `TRADES(beta=6) + VFD(weight=0.02)` makes one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, final

from advalign.errors import UserError, require
from advalign.objectives.parts import Base, Need, Part, PlugIn

T = TypeVar("T")


@final
class Method:
    """A base and plug-ins; plug-ins commute, so they are kept in alphabetical order and `str(method)` is canonical.

    Raises:
        UserError: the parts make no sense together; the reason is named.
    """

    def __init__(self, base: Base, plugins: Iterable[PlugIn] = ()) -> None:
        self.base = base
        self.plugins = tuple(sorted(plugins, key=lambda plugin: plugin.name))
        names = [plugin.name for plugin in self.plugins]
        for name in names:
            require(names.count(name) == 1, f"{self}: {name!r} is named twice")
        reads_adv = [plugin.name for plugin in self.plugins if any(need.view == "adv" for need in plugin.needs)]
        if base.craft is None and reads_adv:
            raise UserError(f"{self}: {reads_adv[0]!r} reads adversarial examples, but {base.name!r} makes none")
        climbs = [plugin.name for plugin in self.plugins if plugin.goal is not None]
        require(len(climbs) <= 1, f"{self}: {' and '.join(climbs)} each replace what the attack climbs; take one")

    def __add__(self, plugin: PlugIn) -> Method:
        return Method(self.base, (*self.plugins, plugin))

    def __str__(self) -> str:
        return "+".join(str(part) for part in self.parts)

    def __repr__(self) -> str:
        return f"Method({self})"

    @property
    def parts(self) -> tuple[Part, ...]:
        """The base, then the plug-ins."""
        return (self.base, *self.plugins)

    @property
    def needs(self) -> tuple[Need, ...]:
        """The passes of a training step, each once, the base's first: BatchNorm makes order part of the result."""
        return union(part.needs for part in self.parts)

    @property
    def guests(self) -> tuple[str, ...]:
        """The networks beside the student, by name."""
        return union((need.net,) for need in self.needs if need.net != "student")


def union(groups: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """Return every item once, in the order of first sight."""
    return tuple(dict.fromkeys(item for group in groups for item in group))
