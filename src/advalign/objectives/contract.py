"""What an objective and its parts exchange: the passes that a part needs, the outputs it gets, the terms it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

from torch import Tensor

from advalign.attacks.ascent import Start
from advalign.models.taps import Output

T = TypeVar("T")


class Need(NamedTuple):
    """One forward pass that a part reads: a network on a view of the batch."""

    net: str  # "student", "ema" (an average of it that a plug-in keeps), or a guest: "vanilla"
    view: str  # "clean", "adv", "second" (another augmentation of the same images), or a view that the base makes


class Term(NamedTuple):
    """One summand of the loss."""

    weight: float | Tensor
    value: Tensor  # scalar
    supervises: str | None = None  # the view whose hard labels it fits; None for a term that ties, smooths or guides


@dataclass(frozen=True)
class TrainingAttack:
    """How a method makes its training examples; part of the method, and a recipe may override it."""

    start: Start
    mode: Literal["eval", "train"] = "eval"  # of the student, so of its BatchNorm
    steps: int = 10


Outputs = Mapping[Need, Output]
Terms = dict[str, Term]
Views = Mapping[str, Tensor]  # images (N, C, H, W) by the name of the view
Network = Callable[[Tensor], Output]
Networks = Mapping[str, Network]
Replaceable = Literal["labels", "targets", "attack_loss", "threat", "average", "norms"]
Calibration = Mapping[str, Mapping[str, Tensor]]  # values by layer and name

CLEAN, ADV, SECOND = Need("student", "clean"), Need("student", "adv"), Need("student", "second")


def without_labels(base: Terms) -> Terms:
    """Return the terms that do not supervise hard labels."""
    return {name: term for name, term in base.items() if not term.supervises}


def union(groups: Iterable[Iterable[T]]) -> tuple[T, ...]:
    """Return every item once, in the order of first sight."""
    return tuple(dict.fromkeys(item for group in groups for item in group))
