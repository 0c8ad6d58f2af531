"""The contract of a base and of a plug-in: what it asks for, what it gets, what it may change."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from advalign.attacks.ascent import AttackLoss, Start
from advalign.attacks.losses import cross_entropy
from advalign.errors import require
from advalign.models.taps import Output, Tapped
from advalign.spelling import spell
from advalign.threats import Threat

if TYPE_CHECKING:
    from advalign.objectives.method import Method

Replaceable = Literal["labels", "attack_loss", "threat"]
Calibration = Mapping[str, Mapping[str, Tensor]]


class Need(NamedTuple):
    """One forward pass that a part reads: a network on a view of the batch."""

    net: str  # "student", or a guest: "vanilla"
    view: str  # "clean", "adv", "second" (another augmentation of the same images), or a view that the base makes


class Term(NamedTuple):
    """One summand of the loss."""

    weight: float | Tensor
    value: Tensor  # scalar
    supervises: str | None = None  # the view whose hard labels it teaches; None for what ties, smooths or guides


Outputs = Mapping[Need, Output]
Terms = dict[str, Term]
Views = Mapping[str, Tensor]  # view to images (N, C, H, W)
Network = Callable[[Tensor], Output]
Networks = Mapping[str, Network]
CLEAN, ADV, SECOND = Need("student", "clean"), Need("student", "adv"), Need("student", "second")


def without_labels(base: Terms) -> Terms:
    """Return the terms that do not teach hard labels."""
    return {name: term for name, term in base.items() if not term.supervises}


@dataclass(frozen=True)
class TrainingAttack:
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
    init_from: str | None = None  # the guest whose weights the student begins with

    def __init__(self) -> None:  # nn.Module's own takes anything, so a part without arguments would too
        super().__init__()

    def __str__(self) -> str:
        lost = [name for name in inspect.signature(type(self)).parameters if name not in vars(self)]
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

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Look at the student before an epoch; what is kept must be a buffer, or a resumed run would lose it.

        Args:
            batches: the epoch's own, augmented; images (N, C, H, W) in [0, 1] and labels (N,). Can be walked again.
            progress: the share of the epochs that is done, in [0, 1).
        """

    @abstractmethod
    def terms(self, outs: Outputs, y: Tensor) -> Terms:
        """Return the named terms of the loss from the declared passes and the labels (N,)."""


class Base(Part):
    """An adversarial-training method: how examples are crafted, which passes it reads, which terms it sums."""

    supervises: tuple[str, ...] = ()  # the views whose hard labels its terms teach
    training_attack: TrainingAttack | None = TrainingAttack(start="gaussian")  # None: no adversarial examples
    standalone_reason: str = ""  # why no plug-in joins it; any may if empty

    def attack_loss(self, nets: Networks, views: Views, y: Tensor) -> AttackLoss:
        """Return what the attack climbs for the clean views of a batch; cross entropy unless the method says otherwise.

        Args:
            nets: the student and the guests; a guest gives logits alone. Gradient flows through all to the images.
            views: `clean`, and `second` where the method asks for a second augmentation.
            y: labels (N,).
        """
        return AttackLoss(lambda x_adv: nets["student"](x_adv).logits, cross_entropy, y)

    def views(self, x: Tensor, x_adv: Tensor) -> dict[str, Tensor]:
        """Return the views of the batch by name."""
        return {"clean": x, "adv": x_adv}

    def __add__(self, plugin: PlugIn) -> Method:
        from advalign.objectives.method import Method  # which is made of parts

        return Method(self, (plugin,))


class PlugIn(Part):
    """A part that joins any base. It may do what its methods say, and nothing else."""

    learns: tuple[str, ...] = ()  # guests that are trained with the student; the others stay frozen
    replaces: frozenset[Replaceable] = frozenset()
    """What of the base it takes the place of, each of which one plug-in of a method may do: `labels` (`reweigh` scales
    or drops the terms that supervise hard labels), `attack_loss` (the attack climbs the plug-in's), `threat`
    (`attack_threat` changes what the attack may do)."""

    def joins(self, base: Base) -> None:
        """Refuse a base with which the plug-in makes no sense.

        Raises:
            UserError: the reason.
        """

    def attack_loss(self, nets: Networks, views: Views, y: Tensor) -> AttackLoss:
        """Return what the attack climbs, for plug-ins that replace the base's; as `Base.attack_loss`."""
        raise NotImplementedError(f"{self.name} replaces no attack loss")

    def attack_threat(self, student: Network, x: Tensor, threat: Threat) -> Threat:
        """Return what the attack may do to images x (N, C, H, W), for plug-ins that replace the threat."""
        return threat

    def views(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the views of the batch as the training passes shall see them."""
        return views

    def reweigh(self, base: Terms) -> Terms:
        """Scale or drop terms of the base by what they teach, so that plug-ins commute."""
        return base

    def calibrate(self, outs: Outputs, terms: Terms) -> Calibration:
        """Return what the log shall tell of the plug-in, by layer and name; looked at once an epoch, on one batch."""
        return {}
