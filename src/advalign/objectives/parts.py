"""The contract of methods: what a base or a plug-in asks for and gets, and how they join to a method."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, TypeVar, final

from torch import Tensor, nn

from advalign.attacks.ascent import Goal, Start
from advalign.attacks.losses import cross_entropy
from advalign.errors import UserError, require
from advalign.models.taps import Out, Tapped
from advalign.spelling import spell
from advalign.threats import Threat

T = TypeVar("T")
Calibration = Mapping[str, Mapping[str, Tensor]]


class Need(NamedTuple):
    """One forward pass that a part reads: a network on a view of the batch."""

    net: str  # "student", or a guest: "vanilla"
    view: str  # "clean", "adv", "second" (another augmentation of the same images), or a view that the base makes


class Term(NamedTuple):
    """One summand of the loss."""

    weight: float | Tensor
    value: Tensor  # scalar
    teaches: str | None = None  # the view whose hard labels it teaches; None for what ties, smooths or guides


Outs = Mapping[Need, Out]
Terms = dict[str, Term]
Views = Mapping[str, Tensor]  # view to images (N, C, H, W)
Network = Callable[[Tensor], Out]
Networks = Mapping[str, Network]
CLEAN, ADV, SECOND = Need("student", "clean"), Need("student", "adv"), Need("student", "second")


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
    begins_as: str | None = None  # the guest whose weights the student begins with

    def __init__(self) -> None:  # nn.Module's own takes anything, so a part without arguments would too
        super().__init__()

    def __str__(self) -> str:
        lost = [name for name in inspect.signature(type(self)).parameters if name not in vars(self)]
        require(not lost, f"{self.name} must keep its argument {lost[:1]} under that name, or it cannot be told apart")
        return spell(self.name, type(self), vars(self))

    def adapt(self, student: nn.Module) -> nn.Module:
        """Return the student as the part wants it, before the optimiser is built; learnt modules are made here."""
        return student

    def restore(self, student: nn.Module) -> nn.Module:
        """Return the plain network of an adapted student: what is evaluated and saved."""
        return student

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the names of the modules whose outputs the terms read, in the student and in the guests."""
        return ()

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Look at the student before an epoch; what is kept must be a buffer, or a resumed run would lose it.

        Args:
            batches: the epoch's own, augmented; images (N, C, H, W) in [0, 1] and labels (N,). Can be walked again.
            progress: the share of the epochs that is done, in [0, 1).
        """

    @abstractmethod
    def terms(self, outs: Outs, y: Tensor) -> Terms:
        """Return the named terms of the loss from the declared passes and the labels (N,)."""


class Base(Part):
    """An adversarial-training method: how examples are crafted, which passes it reads, which terms it sums."""

    teaches: tuple[str, ...] = ()  # the views whose hard labels its terms teach
    craft: Craft | None = Craft(start="gaussian")  # None: no adversarial examples
    alone: str = ""  # why no plug-in joins it; any may if empty

    def goal(self, nets: Networks, views: Views, y: Tensor) -> Goal:
        """Return what the attack climbs for the clean views of a batch; cross entropy unless the method says otherwise.

        Args:
            nets: the student and the guests; a guest gives logits alone. Gradient flows through all to the images.
            views: `clean`, and `second` where the method asks for a second augmentation.
            y: labels (N,).
        """
        return Goal(lambda x_adv: nets["student"](x_adv).logits, cross_entropy, y)

    def views(self, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """Return the views of the batch by name."""
        return {"clean": x, "adv": x_adv}

    def __add__(self, plugin: PlugIn) -> Method:
        return Method(self, (plugin,))


class PlugIn(Part):
    """A part that joins any base. It may do what its methods say, and nothing else."""

    learns: tuple[str, ...] = ()  # guests that are trained with the student; the others stay frozen
    replaces_labels: bool = False  # whether `reweigh` scales or drops what teaches hard labels
    replaces_goal: bool = False  # whether the attack climbs the plug-in's `goal` and not the base's
    replaces_budget: bool = False  # whether `budget` changes what the attack may do

    def joins(self, base: Base) -> None:
        """Refuse a base with which the plug-in makes no sense.

        Raises:
            UserError: the reason.
        """

    def goal(self, nets: Networks, views: Views, y: Tensor) -> Goal:
        """Return what the attack climbs, for plug-ins that replace the base's; as `Base.goal`."""
        raise NotImplementedError(f"{self.name} replaces no goal")

    def budget(self, student: Network, x: Tensor, threat: Threat) -> Threat:
        """Return what the attack may do to images x (N, C, H, W), for plug-ins that replace the budget."""
        return threat

    def views(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the views of the batch as the training passes shall see them."""
        return views

    def reweigh(self, base: Terms) -> Terms:
        """Scale or drop terms of the base by what they teach, so that plug-ins commute."""
        return base

    def calibrate(self, outs: Outs, terms: Terms) -> Calibration:
        """Return what the log shall tell of the plug-in, by layer and name; looked at once an epoch, on one batch."""
        return {}


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
        require(not (base.alone and names), f"{self}: {base.name!r} {base.alone}, so no plug-in joins it")
        reads_adv = [plugin.name for plugin in self.plugins if any(need.view == "adv" for need in plugin.needs)]
        if base.craft is None and reads_adv:
            raise UserError(f"{self}: {reads_adv[0]!r} reads adversarial examples, but {base.name!r} makes none")
        takers = [plugin.name for plugin in self.plugins if plugin.replaces_labels]
        require(len(takers) <= 1, f"{self}: {' and '.join(takers)} each decide what teaches the labels; take one")
        require(
            not takers or bool(base.teaches),
            f"{self}: {takers[0] if takers else ''!r} takes the place of hard labels, but {base} has none",
        )
        for plugin in self.plugins:
            unread = sorted(set(plugin.learns) - {need.net for need in plugin.needs})
            require(not unread, f"{plugin.name}: {unread} learns, but is none of the networks that it needs")
        climbs = [plugin.name for plugin in self.plugins if plugin.replaces_goal]
        require(len(climbs) <= 1, f"{self}: {' and '.join(climbs)} each replace what the attack climbs; take one")
        budgets = [plugin.name for plugin in self.plugins if plugin.replaces_budget]
        require(len(budgets) <= 1, f"{self}: {' and '.join(budgets)} each set the attack's budget; take one")
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
        return union([*run, *((part.begins_as,) for part in self.parts if part.begins_as)])

    @property
    def defends(self) -> bool:
        """Whether the student learns from adversarial images, here or in the run that it begins as."""
        return self.base.craft is not None or self.base.begins_as is not None

    @property
    def second(self) -> bool:
        """Whether a step needs the batch in a second augmentation."""
        return any(need.view == "second" for need in self.needs)


def union(groups: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """Return every item once, in the order of first sight."""
    return tuple(dict.fromkeys(item for group in groups for item in group))
