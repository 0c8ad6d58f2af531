"""A method: a base and plug-ins that make sense together, not yet bound to networks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar, final

from advalign.errors import UserError, require
from advalign.objectives.contract import Base, Need, Part, PlugIn, Replaceable

T = TypeVar("T")

# What of a base one plug-in may take the place of, and what is said of two that would.
_CLASHES: dict[Replaceable, str] = {
    "labels": "decide what supervises the labels",
    "attack_loss": "replace the loss of the attack",
    "threat": "replace the threat model of the attack",
}


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
            require(names.count(name) == 1, lambda: f"{self}: {name!r} is named twice")
        require(
            not (base.standalone_reason and names),
            lambda: f"{self}: {base.name!r} {base.standalone_reason}, so no plug-in joins it",
        )
        reads_adv = [plugin.name for plugin in self.plugins if any(need.view == "adv" for need in plugin.needs)]
        if base.training_attack is None and reads_adv:
            raise UserError(f"{self}: {reads_adv[0]!r} reads adversarial examples, but {base.name!r} makes none")
        for what, clash in _CLASHES.items():
            rivals = [plugin.name for plugin in self.plugins if what in plugin.replaces]
            require(len(rivals) <= 1, lambda: f"{self}: {' and '.join(rivals)} each {clash}; take one")
            if what == "labels" and rivals and not base.supervises:
                raise UserError(f"{self}: {rivals[0]!r} takes the place of hard labels, but {base} has none")
        for plugin in self.plugins:
            unread = sorted(set(plugin.learns) - {need.net for need in plugin.needs})
            require(not unread, lambda: f"{plugin.name}: {unread} learns, but is none of the networks that it needs")
        for plugin in self.plugins:
            plugin.joins(base)

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
    def learners(self) -> tuple[str, ...]:
        """The guests that are trained with the student."""
        return union(plugin.learns for plugin in self.plugins)

    @property
    def guests(self) -> tuple[str, ...]:
        """The networks beside the student, by name."""
        run = ((need.net,) for need in self.needs if need.net != "student")
        return union([*run, *((part.init_from,) for part in self.parts if part.init_from)])

    @property
    def defends(self) -> bool:
        """Whether the student learns from adversarial images, here or in the run that it begins as."""
        return self.base.training_attack is not None or self.base.init_from is not None

    @property
    def second(self) -> bool:
        """Whether a step needs the batch in a second augmentation."""
        return any(need.view == "second" for need in self.needs)


def union(groups: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """Return every item once, in the order of first sight."""
    return tuple(dict.fromkeys(item for group in groups for item in group))
