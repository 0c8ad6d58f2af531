"""The contract of methods: what a base or a plug-in asks for and gets, and how they join to a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar, final

from torch import Tensor, nn

from advalign.attacks.ascent import Goal, Start
from advalign.attacks.losses import cross_entropy
from advalign.errors import UserError, require
from advalign.models.taps import Out
from advalign.spelling import spell

T = TypeVar("T")


class Need(NamedTuple):
    """One forward pass that a part reads: a network on a view of the batch."""

    net: str  # "student", or a guest: "vanilla"
    view: str  # "clean", "adv", or a view that the base makes


class Term(NamedTuple):
    """One summand of the loss."""

    weight: float
    value: Tensor  # scalar
    teaches: str | None = None  # the view whose hard labels it teaches; None for what ties, smooths or guides


Outs = Mapping[Need, Out]
Terms = dict[str, Term]
Network = Callable[[Tensor], Out]
CLEAN, ADV = Need("student", "clean"), Need("student", "adv")


def without_labels(base: Terms) -> Terms:
    """Return the terms that do not teach hard labels."""
    return {name: term for name, term in base.items() if not term.teaches}


@dataclass(frozen=True)
class Craft:
    """How a method makes its training examples; part of the method, and a recipe may override it."""

    start: Start
    mode: Literal["eval", "train"] = "eval"  # of the student, so of its BatchNorm
    steps: int = 10


class Part(nn.Module, ABC):
    """What bases and plug-ins share: a name, the passes they read, and a canonical spelling.

    The constructor is the schema: it keeps each argument under its own name, and `str(part)` spells those that differ
    from their defaults.
    """

    name: ClassVar[str]
    needs: tuple[Need, ...] = (CLEAN, ADV)

    def __init__(self) -> None:  # nn.Module's own takes anything, so a part without arguments would too
        super().__init__()

    def __str__(self) -> str:
        return spell(self.name, type(self), vars(self))

    @abstractmethod
    def terms(self, outs: Outs, y: Tensor) -> Terms:
        """Return the named terms of the loss from the declared passes and the labels (N,)."""


class Base(Part):
    """An adversarial-training method: how examples are crafted, which passes it reads, which terms it sums."""

    craft: Craft | None = Craft(start="gaussian")  # None: no adversarial examples

    def goal(self, student: Network, x: Tensor, y: Tensor) -> Goal:
        """Return what the attack climbs for images x (N, C, H, W); cross entropy unless the method says otherwise."""
        return Goal(lambda x_adv: student(x_adv).logits, cross_entropy, y)

    def views(self, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """Return the views of the batch by name."""
        return {"clean": x, "adv": x_adv}

    def __add__(self, plugin: PlugIn) -> Method:
        return Method(self, (plugin,))


class PlugIn(Part):
    """A part that joins any base. It may do what its methods say, and nothing else."""

    learns: tuple[str, ...] = ()  # guests that are trained with the student; the others stay frozen
    goal: Callable[[Network, Tensor, Tensor], Goal] | None = None  # replaces the base's, for methods that define one

    def adapt(self, student: nn.Module) -> nn.Module:
        """Return the student as the plug-in wants it, before the optimiser is built; learnt modules are made here."""
        return student

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the names of the modules whose outputs the terms read, in the student and in the guests."""
        return ()

    def reweigh(self, base: Terms) -> Terms:
        """Scale or drop terms of the base by what they teach, so that plug-ins commute."""
        return base


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
    def learners(self) -> tuple[str, ...]:
        """The guests that are trained with the student."""
        return union(plugin.learns for plugin in self.plugins)

    @property
    def guests(self) -> tuple[str, ...]:
        """The networks beside the student, by name."""
        return union((need.net,) for need in self.needs if need.net != "student")


def union(groups: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """Return every item once, in the order of first sight."""
    return tuple(dict.fromkeys(item for group in groups for item in group))
