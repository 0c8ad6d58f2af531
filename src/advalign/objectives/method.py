"""A method: a base and plug-ins, not yet bound to networks. What a base and a plug-in may do is written here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar, final

from torch import Tensor, nn

from advalign.attacks.ascent import AttackLoss
from advalign.attacks.losses import cross_entropy
from advalign.errors import UserError, require, shorten
from advalign.models.taps import Tapped
from advalign.objectives.contract import (
    ADV,
    CLEAN,
    Calibration,
    Need,
    Network,
    Networks,
    Outputs,
    Replaceable,
    Terms,
    TrainingAttack,
    Views,
    union,
)
from advalign.shapes import ImageBatch, Labels, Logits, Rows
from advalign.spelling import parameters_of, spell
from advalign.threats import Threat


class Part(nn.Module, ABC):
    """What bases and plug-ins share: a name, the passes they read, and a canonical spelling.

    The constructor is the schema: it keeps each argument under its own name, and `str(part)` spells those that differ
    from their defaults.
    """

    name: ClassVar[str]
    needs: tuple[Need, ...] = (CLEAN, ADV)
    init_from: str | None = None  # the guest whose weights initialise the student
    revision: ClassVar[int] = 0  # one more where a correction changes what a setting trains: runs get new names

    def __init__(self) -> None:  # nn.Module's own takes anything, so a part without arguments would too
        super().__init__()

    def __str__(self) -> str:
        lost = [each.name for each in parameters_of(type(self)) if each.name not in vars(self)]
        require(
            not lost,
            lambda: f"{self.name} must keep its argument {lost[:1]} under that name, or it cannot be told apart",
        )
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

    @property
    def waits(self) -> bool:
        """Whether it looks at the student or the progress before each epoch or step."""
        return type(self).start_epoch is not Part.start_epoch or type(self).start_step is not Part.start_step

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Look at the student before an epoch; what is kept must be a buffer, or a resumed run would lose it.

        Args:
            batches: those of the epoch, augmented; images (N, C, H, W) in [0, 1] and labels (N,). They can be read
                more than once.
            progress: the share of the epochs that is done, in [0, 1).
        """

    def start_step(self, progress: float) -> None:
        """Note how far the training is before a step; called at each epoch's start as well.

        Args:
            progress: the share of all steps that is done, in [0, 1). What is kept of it is written in place into a
                buffer, which need not be saved.
        """

    @abstractmethod
    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the named terms of the loss from the declared passes and the labels (N,)."""


class Base(Part):
    """An adversarial-training method: how its examples are made, which passes it reads, which terms it sums."""

    supervises: tuple[str, ...] = ()  # the views whose hard labels its terms fit
    training_attack: TrainingAttack | None = TrainingAttack(start="gaussian")  # None: no adversarial examples
    standalone_reason: str = ""  # why no plug-in joins it; any may if empty
    cross_entropy: bool = True  # whether its terms on hard labels are cross entropies: soft ones can take their place

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the loss that the attack maximises; cross entropy unless the method defines another.

        Args:
            nets: the student and the guests; a guest gives logits alone. Gradient flows through all to the images.
            views: `clean`, and `second` where the method asks for a second augmentation.
            y: labels (N,).
        """
        return AttackLoss(lambda x_adv: nets["student"](x_adv).logits, cross_entropy, y)

    def views(self, x: ImageBatch, x_adv: ImageBatch) -> dict[str, Tensor]:
        """Return the views of the batch by name, from images x and x_adv (N, C, H, W)."""
        return {"clean": x, "adv": x_adv}

    def __add__(self, plugin: PlugIn) -> Method:
        return Method(self, (plugin,))


class PlugIn(Part):
    """A part that joins any base. It can do what its methods offer, and nothing else."""

    learns: tuple[str, ...] = ()  # guests that are trained with the student; the others stay frozen
    replaces: frozenset[Replaceable] = frozenset()
    """What it replaces of the base; at most one plug-in of a method may replace each. `labels`: `reweigh` scales or
    drops the terms that supervise hard labels. `attack_loss`: the attack maximises the plug-in's. `threat`:
    `attack_threat` changes the threat model of the attack. `targets`: `soft_targets` takes the place of the hard labels
    in every term that supervises them. `average`: it keeps an average of the student, the network `ema`. `norms`:
    `adapt` gives the student other BatchNorms."""
    drops_labels: bool = False  # whether `reweigh` drops every term on hard labels, and it adds none to the student
    reads_labels: bool = False  # whether it changes such terms, and means nothing without
    augmentations: int = 1
    """In how many augmentations the batch is attacked; the loss is taken over all: first all images in the first, then
    all in the next."""
    further_augment: str | None = None
    """What makes the further augmentations, a name in `AUGMENTATIONS`; what makes the first, if None."""
    weights_climb_first: bool = False
    """Whether adversarial weight perturbation climbs the loss on the first augmentation alone, without its terms."""
    reads_rows: bool = False  # whether it keeps something for each training image
    reads_start: bool = False  # whether `attacked_from` is to be told where the attack started
    images: int = 0  # in the training set, at most; set for parts with `reads_rows`
    partner: str | None = None
    """A learning guest of the student's architecture whose weights go into the average with the student's. The average
    is then the model of the method, what is exported; no part needs to read it."""
    hands_back: bool = False  # whether student and partner take over the average at the start of this epoch
    attack_needs: tuple[Need, ...] | None = None
    """The passes on clean views that `soft_targets` reads, if the cross entropy of the attack is to read them too."""

    def joins(self, base: Base) -> None:
        """Refuse a base with which the plug-in makes no sense.

        Raises:
            UserError: the reason.
        """

    def attack_loss(self, nets: Networks, views: Views, y: Labels) -> AttackLoss:
        """Return the loss that the attack maximises, for plug-ins that replace the base's; as `Base.attack_loss`."""
        raise NotImplementedError(f"{self.name} replaces no attack loss")

    def attack_threat(self, student: Network, x: ImageBatch, threat: Threat) -> Threat:
        """Return the threat model for images x (N, C, H, W), for plug-ins that replace the threat."""
        return threat

    def soft_targets(self, outs: Outputs, y: Labels, rows: Rows | None) -> Logits:
        """Return a distribution over the classes for each image (N, K), for plug-ins that replace the targets.

        The cross entropy of every term that supervises hard labels is taken with it, and so is that of the attack, if
        the attack has one and there are `attack_needs`. No gradient flows to it.

        Args:
            rows: the numbers of the images in the training set (N,), below `images`, for parts with `reads_rows`; None
                in the attack, and where a loop of one's own gives none.
        """
        raise NotImplementedError(f"{self.name} replaces no targets")

    def average_decay(self) -> float | Tensor:
        """Return what a step leaves of the average, in [0, 1], for plug-ins that keep one: 0 copies the student.

        Called once after each step; a number that changes within an epoch must be a tensor.
        """
        raise NotImplementedError(f"{self.name} keeps no average")

    def student_share(self) -> float:
        """Return the student's share of what goes into the average, in [0, 1], for plug-ins with a `partner`."""
        raise NotImplementedError(f"{self.name} has no partner")

    def attacked_from(self, start: Tensor) -> None:
        """Note where the attack on the images of a step started (N, C, H, W), for plug-ins with `reads_start`."""

    def views(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the views of the batch that the training passes read."""
        return views

    def reweigh(self, base: Terms) -> Terms:
        """Scale or drop terms of the base by what they supervise, so that plug-ins commute."""
        return base

    def calibrate(self, outs: Outputs, terms: Terms) -> Calibration:
        """Return what the log records of the plug-in, by layer and name; called once an epoch, on one batch."""
        return {}


# What of a base one plug-in may replace: by which of its methods, and how the error describes two that would.
_CLASHES: dict[Replaceable, tuple[str, str]] = {
    "labels": ("reweigh", "decide what supervises the labels"),
    "attack_loss": ("attack_loss", "replace the loss of the attack"),
    "threat": ("attack_threat", "replace the threat model of the attack"),
    "targets": ("soft_targets", "put soft targets in the place of hard labels"),
    "average": ("average_decay", "keep an average of the student"),
    "norms": ("adapt", "give the student norms for parts of a batch"),
}


@final
class Method:
    """A base and plug-ins; plug-ins commute, so they are kept in alphabetical order and `str(method)` is canonical.

    Example:
        >>> import advalign as aa
        >>> aa.Method(aa.TRADES(beta=6), [aa.VFD(weight=0.1), aa.BGAT()])
        Method(trades+bgat+vfd(weight=0.1))

    Raises:
        UserError: the parts make no sense together; the error names the reason.
    """

    def __init__(self, base: Base, plugins: Iterable[PlugIn] = ()) -> None:
        self.base = base
        self.plugins = tuple(sorted(plugins, key=lambda plugin: plugin.name))
        self.augmentations = max([1, *(plugin.augmentations for plugin in self.plugins)])
        """In how many augmentations the batch is attacked; the loss is taken over all."""
        names = [plugin.name for plugin in self.plugins]
        for name in names:
            require(names.count(name) == 1, lambda: f"{self._shown}: {name!r} is named twice")
        require(
            not (base.standalone_reason and names),
            lambda: f"{self._shown}: {base.name!r} {base.standalone_reason}, so no plug-in joins it",
        )
        attacking = (
            plugin.augmentations > 1 or any(need.view == "adv" for need in plugin.needs) for plugin in self.plugins
        )
        reads_adv = [plugin.name for plugin, reads in zip(self.plugins, attacking, strict=True) if reads]
        if base.training_attack is None and reads_adv:
            raise UserError(f"{self._shown}: {reads_adv[0]!r} reads adversarial examples, but {base.name!r} makes none")
        for replaceable, (_, clash) in _CLASHES.items():
            rivals = [plugin.name for plugin in self.plugins if replaceable in plugin.replaces]
            require(len(rivals) <= 1, lambda: f"{self._shown}: {' and '.join(rivals)} each {clash}; take one")
            if replaceable in ("labels", "targets") and rivals and not base.supervises:
                has_none = f"but {shorten(str(base))} has none"
                raise UserError(f"{self._shown}: {rivals[0]!r} takes the place of hard labels, {has_none}")
            require(
                replaceable != "targets" or not rivals or base.cross_entropy,
                lambda: f"{self._shown}: {rivals[0]!r} softens cross entropies, and {base.name!r} has none",
            )
        droppers = [plugin.name for plugin in self.plugins if plugin.drops_labels]
        changers = [plugin.name for plugin in self.plugins if plugin.reads_labels]
        require(
            not (droppers and changers),
            lambda: f"{self._shown}: {changers[0]!r} changes the terms on hard labels, and {droppers[0]!r} drops them",
        )
        keeper = self.replacing("average")
        averaging = [part.name for part in self.parts if any(need.net == "ema" for need in part.needs)]
        require(
            keeper is not None or not averaging,
            lambda: f"{self._shown}: {averaging[0]!r} reads an average of the student, and no plug-in keeps one",
        )
        require(
            keeper is None or bool(averaging) or keeper.partner is not None,
            lambda: f"{self._shown}: {keeper and keeper.name!r} keeps an average of the student, and no part reads it",
        )
        augmenting = [plugin.name for plugin in self.plugins if plugin.augmentations > 1]
        require(
            len(augmenting) <= 1,
            lambda: f"{self._shown}: {' and '.join(augmenting)} each attack further augmentations; take one",
        )
        rebuilt = [part.name for part in self.parts if type(part).restore is not Part.restore]
        require(
            not (self.exports_average and rebuilt),
            lambda: (
                f"{self._shown}: {rebuilt[0]!r} rebuilds the student, and {keeper and keeper.name!r} averages it with "
                "another network"
            ),
        )
        readers = [part.name for part in self.parts if any(need.view == "second" for need in part.needs)]
        require(
            not (augmenting and readers),
            lambda: f"{self._shown}: {readers[0]!r} reads the second augmentation, which is attacked as well; take one",
        )
        require(
            not (augmenting and self.reads_rows),
            lambda: f"{self._shown}: each image comes several times a step, and one label would be kept for all",
        )
        for plugin in self.plugins:
            for replaceable in plugin.replaces:
                hook = _CLASHES[replaceable][0]
                written = getattr(type(plugin), hook) is not getattr(PlugIn, hook)
                require(written, lambda: f"{plugin.name!r} says that it replaces {replaceable!r}: write {hook}(...)")
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
    def _shown(self) -> str:
        """The spelling as far as a message shows it."""
        return shorten(str(self))

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
        run = ((need.net,) for need in self.needs if need.net not in ("student", "ema"))
        return union([*run, *((part.init_from,) for part in self.parts if part.init_from)])

    @property
    def waiting(self) -> list[str]:
        """The parts, by name, that look at the student or the progress before each epoch or step."""
        return [part.name for part in self.parts if part.waits]

    @property
    def annealing(self) -> list[str]:
        """The parts, by name, that follow the progress in each step."""
        return [part.name for part in self.parts if part.waits and type(part).start_step is not Part.start_step]

    def replacing(self, replaceable: Replaceable) -> PlugIn | None:
        """Return the plug-in that replaces this of the base, if one does."""
        return next((plugin for plugin in self.plugins if replaceable in plugin.replaces), None)

    @property
    def exports_average(self) -> bool:
        """Whether the model of the method is an average that it keeps, and not the student."""
        keeper = self.replacing("average")
        return keeper is not None and keeper.partner is not None

    @property
    def defends(self) -> bool:
        """Whether the student learns from adversarial images, here or in the run that initialises it."""
        return self.base.training_attack is not None or self.base.init_from is not None

    @property
    def second(self) -> bool:
        """Whether a step needs the batch in a second augmentation, or in more."""
        return self.further > 0

    @property
    def further(self) -> int:
        """How many further augmentations of the batch a step needs."""
        return max(self.augmentations - 1, int(any(need.view == "second" for need in self.needs)))

    @property
    def further_augment(self) -> str | None:
        """What makes the further augmentations, by name; what makes the first, if None."""
        return next((plugin.further_augment for plugin in self.plugins if plugin.further_augment), None)

    @property
    def reads_rows(self) -> bool:
        """Whether a step needs the numbers of its images in the training set."""
        return any(plugin.reads_rows for plugin in self.plugins)
