"""The contract of every attack, held in one place, so that a new attack writes one method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from advalign.attacks.batches import in_type_of, prepared
from advalign.attacks.goal import Goal
from advalign.attacks.pass_counter import PassCounter
from advalign.errors import UserError, require
from advalign.models.adapted import adapted
from advalign.models.modes import evaluating, outside_inference_mode
from advalign.shapes import ImageBatch, Labels
from advalign.spelling import check_arguments, check_numbers, spell
from advalign.threats import Norm, Threat, require_inside

_COUNTS = ("steps", "restarts", "targets", "queries")  # arguments that are numbers of something, at least 1


@dataclass(frozen=True)
class Attack(ABC):
    """Maps images (N, C, H, W) in [0, 1] and labels (N,) to adversarial images of that shape and range.

    A subclass is a frozen dataclass whose fields are its arguments, each with a default, and writes `name` and `run`.
    `attack(model, x, y)` then keeps the promises of every attack: images are in [0, 1]; the model runs in eval mode,
    with gradients on whatever the caller's mode, and is afterwards as it was; the input is not changed; everything is
    computed in fp32 at least, and in float64 for a float64 model; and the result is in [0, 1] and, unless the attack
    declares that it is not bounded, inside the threat model.

    Example:
        >>> import advalign as aa
        >>> str(aa.attacks.PGD(aa.Linf(8 / 255), steps=10))
        'pgd(steps=10)'

    Raises:
        UserError: an argument of the wrong type, or a number of steps, restarts, targets or queries below 1.
    """

    name: ClassVar[str]
    """how it is spelled"""
    bounded: ClassVar[bool] = True
    """whether it stays inside its threat model; one that does not takes no part in a worst case"""
    transfers: ClassVar[bool] = False
    """whether its examples carry over to other models: it goes on to a last step, or asks for a margin. The others stop
    at the first image that fools, which lies just beyond the boundary of the model that they attack, and of no other"""
    nearest: ClassVar[tuple[Norm, ...]] = ()
    """norms in which it looks for the nearest adversarial image, so that accuracy follows at every radius"""
    uses_gradients: ClassVar[bool] = True
    """whether it asks the model for gradients; one that counts queries instead sees less, so it must not break more"""
    always_spelled: ClassVar[str] = "steps"
    """the argument that the spelling shows though it be the default"""
    benchmark: ClassVar[str] = ""
    """the public benchmark that compares models by it, with its default arguments; reports show such an attack apart"""
    remark: ClassVar[str] = ""
    """what every table must say of the accuracy under it"""

    threat: Threat

    def __post_init__(self) -> None:
        arguments = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "threat"}
        check_arguments(self.name, type(self), arguments)
        check_numbers(self.name, arguments)
        for argument in _COUNTS:
            count = arguments.get(argument, 1)
            require(count >= 1, lambda: f"{self.name}: {argument}={count} must be at least 1")

    @abstractmethod
    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Return adversarial images for x (N, C, H, W) in [0, 1] with labels y (N,); N is at least 1.

        The model is in eval mode, its parameters ask for no gradient, and it may be given images of any floating-point
        type, of which it reads a copy. Here x is a copy in fp32 or float64, and y is int64.
        """

    def target_classes(self, model: nn.Module, x: ImageBatch, y: Labels) -> Labels | None:
        """Return the class (N,) to which each image is driven; None if any but its own will do.

        An image whose target is its own class is left as it is. What is drawn here has to be the first random draw of
        `run`, for an evaluation asks again, from the same random state, to count the images that arrived.
        """
        return None

    @final
    def __call__(self, model: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Attack images x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images, detached.

        In any autograd mode of the caller's, `torch.inference_mode()` too.

        Args:
            model: images to logits (N, K), a module or any other function; of those that are called by a function, who
                wrote it sets the mode.
            x: floats; the result has their type. In half precision it is rounded inside the threat model.
            y: whole numbers of any type.

        Raises:
            UserError: images outside [0, 1], or labels that are not one whole number for each; a model that gives no
                tensor, or that no gradient can pass; or an attack that leaves its threat model.
        """
        network = model if isinstance(model, PassCounter) else adapted(model)
        with outside_inference_mode(), evaluating(network), torch.enable_grad():
            copy, labels = prepared(x, y, network.reads)
            if not len(copy):
                return copy.to(x.dtype)
            clean = copy.clone()
            try:
                x_adv = self.run(network, copy, labels).detach()
            except (IndexError, RuntimeError):
                _require_classes(network, copy, labels)
                raise
            threat = self.threat if self.bounded else None
            require_inside(self, threat, x_adv, clean)
            return in_type_of(x, x_adv, threat)

    def __str__(self) -> str:
        """Spell the attack in the one way that keys records: without its threat, never without its steps or queries."""
        return spell(self.name, type(self), vars(self), hidden="threat", always=self.always_spelled)

    @property
    def members(self) -> tuple[Attack, ...]:
        """The attacks that it consists of, in their order; itself, where it is no ensemble."""
        return (self,)

    def with_threat(self, threat: Threat) -> Attack:
        """Return the same attack in another threat model.

        Raises:
            UserError: it cannot attack in that one.
        """
        return replace(self, threat=threat)

    @property
    def to_the_end(self) -> Attack:
        """The attack that goes on after an image is fooled, where it has the choice."""
        if any(field.name == "until_fooled" for field in fields(self)):
            return replace(self, until_fooled=False)  # pyright: ignore[reportCallIssue] (the field is of a subclass)
        return self


def _require_classes(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Refuse labels that are no classes of the model, which its losses fail on in as many ways as there are losses."""
    classes = network(x[:1]).shape[1]
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise UserError(f"label {int(outside[0])} is no class of the model, whose classes are 0 to {classes - 1}")


def attack_survivors(
    model: nn.Module,
    x: ImageBatch,
    goal: Goal,
    attempts: Iterable[Callable[[Tensor], Tensor]],
    *,
    first_on_all: bool = False,
) -> ImageBatch:
    """Make one attempt after another, each on the images that none before has brought to the goal.

    Args:
        x: images (N, C, H, W); returned as they are if no attempt is made.
        attempts: rows (M,) of the batch to adversarial images (M, C, H, W).
        first_on_all: make the first attempt also on images that are at the goal from the start.
    """
    x_adv, rows = x.clone(), torch.arange(len(x), device=x.device)
    for number, attempt in enumerate(attempts):
        if number or not first_on_all:
            rows = rows[~goal.take(rows).reached_by(model, x_adv[rows])]
        if not len(rows):
            break
        x_adv[rows] = attempt(rows)
    return x_adv
