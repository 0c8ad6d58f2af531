"""Targeted attacks: the class to which each image is driven, and which images are driven at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from advalign.attacks.contract import Attack
from advalign.attacks.goal import Goal
from advalign.errors import UserError, require
from advalign.shapes import ImageBatch, Labels

Target = int | Literal["random", "least-likely", "next"] | None


def check_target(name: str, target: Target) -> None:
    """Refuse a class with a negative number.

    Raises:
        UserError: it.
    """
    require(not isinstance(target, int) or target >= 0, lambda: f"{name}: target={target} must be a class, 0 or above")


def check_target_class(attack: Attack, classes: int) -> None:
    """Refuse an attack, or one with members, whose target is none of so many classes.

    Raises:
        UserError: the target, and the classes.
    """
    for name, target in _targets_of(attack):
        if isinstance(target, int) and target >= classes:
            raise UserError(f"{name}: target={target} must be one of the classes 0 to {classes - 1}")


def check_class_order(attacks: Sequence[Attack], surrogate: Sequence[str], classes: Sequence[str]) -> None:
    """Refuse attacks on a surrogate that aim at classes by number, if its classes are in another order than those here.

    Raises:
        UserError: the attack.
    """
    for attack in attacks:
        by_number = [each for _, each in _targets_of(attack) if isinstance(each, int) or each == "next"]
        require(
            not by_number or list(surrogate) == list(classes),
            lambda: (
                f"{attack} aims at classes by their numbers, and the surrogate has its classes in another order: "
                "target=random and target=least-likely do not depend on it"
            ),
        )


def _targets_of(attack: Attack) -> list[tuple[str, Target]]:
    """Return what an attack, or each member of one, is aimed at, with its name."""
    inner = [getattr(each, "attack", each) for each in (attack, *attack.members)]
    return [(each.name, target) for each in inner if (target := getattr(each, "target", None)) is not None]


def choose_targets(target: Target, attack: Attack, model: nn.Module, x: ImageBatch, y: Labels) -> Labels | None:
    """Return the class (N,) to which each image with label y (N,) is driven; None without target.

    `next` is the class after the label, `least-likely` the wrong class with the smallest logit of the clean image, and
    `random` one of the wrong classes, from torch's generator. A class by its number may be an image's own.

    Raises:
        UserError: a number that is no class of the model.
    """
    if target is None:
        return None
    with torch.no_grad():
        logits = model(x)
    classes = logits.shape[1]
    check_target_class(attack, classes)
    if target == "random":
        return (y + torch.randint(1, classes, y.shape, device=y.device)) % classes
    if target == "next":
        return (y + 1) % classes
    if target == "least-likely":
        return logits.scatter(1, y[:, None], torch.inf).argmin(1)
    return torch.full_like(y, int(target))


def pairs_with_wrong_classes(model: nn.Module, x: ImageBatch, y: Labels, most: int) -> Iterator[Tensor]:
    """Yield labels and wrong classes (N, 2), first the wrong class of each image's largest logit; at most so many."""
    with torch.no_grad():
        others = model(x).scatter(1, y[:, None], -torch.inf)
    for target in others.argsort(1, descending=True)[:, :-1].unbind(1)[:most]:  # y is last
        yield torch.stack((y, target), 1)


def pursue(attack: Attack, model: nn.Module, x: Tensor, y: Tensor, run: Callable[[Tensor, Goal], Tensor]) -> Tensor:
    """Run an attack on all images, away from their labels, or on those that are not of their target, towards it."""
    targets = attack.target_classes(model, x, y)
    if targets is None:
        return run(x, Goal(y))
    rows = (targets != y).nonzero().squeeze(1)
    return x.index_copy(0, rows, run(x[rows], Goal(targets[rows], targeted=True))) if len(rows) else x
