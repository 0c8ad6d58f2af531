"""What a training step of a method costs: passes through the student, counted on a tiny network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from advalign.objectives.method import Method
from advalign.objectives.objective import Objective
from advalign.objectives.terms import total
from advalign.shapes import ImageBatch, Logits
from advalign.threats import Linf

STEPS = 10
"""Of the attack, as in all the papers."""


class Passes(NamedTuple):
    """How often a batch passes forward and backward through the student, or an average of it, in one step."""

    forward: int
    backward: int


class _Counts:
    """Images that have passed through a network and its copies, such as the folded twin that attacks run on."""

    forward = backward = 0

    def __deepcopy__(self, memo: object) -> _Counts:
        return self

    def count(self, module: nn.Module, args: object, features: Tensor) -> None:
        """Count a forward pass, as a hook, and later the backward pass through it."""
        self.forward += len(features)
        if features.requires_grad:
            features.register_hook(self._count_backward)

    def of(self, work: Callable[[], object]) -> tuple[int, int]:
        """Return how many images pass forward and backward while some work is done."""
        self.forward = self.backward = 0
        work()
        return self.forward, self.backward

    def _count_backward(self, grad: Tensor) -> None:
        self.backward += len(grad)


class _Student(nn.Module):
    stages: ClassVar[tuple[str, ...]] = ("layer1",)

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 4)

    def forward(self, x: ImageBatch) -> Logits:
        return self.fc(self.layer1(x).mean((2, 3)))


def count_passes(method: Method) -> Passes:
    """Count the student's passes in a step with an attack of 10 steps.

    Example:
        >>> from advalign.objectives import parse
        >>> count_passes(parse("trades"))
        Passes(forward=13, backward=12)
    """
    counts, n = _Counts(), 2
    with torch.random.fork_rng(devices=[]):
        student = _Student()
        student.layer1[2].register_forward_hook(counts.count)
        objective = Objective(method, student, {name: _Student() for name in method.guests}, images=n).train()
        x, y, rows = torch.rand(n, 3, 8, 8), torch.arange(n), torch.arange(n) if method.reads_rows else None
        second = x.flip(3).repeat(method.further, 1, 1, 1) if method.second else None
        objective.start_epoch([(x, y)], progress=0.99)  # when everything that begins late has begun
        attack = partial(objective.perturb, x, y, Linf(), second=second)
        x_adv = attack(steps=1)  # tries the folded twins, once
        shortest, longer = (counts.of(partial(attack, steps=steps)) for steps in (1, 2))
        of_loss = counts.of(lambda: total(objective(x, x_adv, y, second, rows)).backward())
    totals = [a + (STEPS - 1) * (b - a) + c for a, b, c in zip(shortest, longer, of_loss, strict=True)]
    return Passes(*(each // n for each in totals))
