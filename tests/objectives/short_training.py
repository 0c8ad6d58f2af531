"""Tiny networks for every role, and short trainings of any method on them."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from itertools import combinations as combine
from typing import Any

import pytest
import torch
from tests.networks import tiny
from tests.samples import batch
from torch import Tensor

from advalign.errors import UserError
from advalign.objectives import BASES, PLUGINS, Objective, parse, total
from advalign.threats import Linf

GUESTS = ("vanilla", "robust", "guide", "extractor", "natural")


def makes_sense(method: str) -> bool:
    try:
        parse(method)
    except UserError:
        return False
    return True


@cache
def combinations(plugins_at_once: int) -> list[str]:
    """Every base with so many plug-ins, as far as they make sense together."""
    names: list[tuple[str, ...]] = [()]
    for _ in range(plugins_at_once):
        names = [(*before, name) for before in names for name in PLUGINS if not before or name > before[-1]]
    return [method for base in BASES for each in names if makes_sense(method := "+".join((base, *each)))]


def pairs_once() -> list[str]:
    """Every pair of plug-ins that makes sense together, on TRADES or else the first base that takes it."""
    bases = ("trades", *BASES)
    pairs = [[f"{base}+{first}+{second}" for base in bases] for first, second in combine(sorted(PLUGINS), 2)]
    return [method for spellings in pairs if (method := next(filter(makes_sense, spellings), ""))]


def every_part_quick(methods: Iterable[str]) -> list[Any]:
    """Mark methods as slow, but for every base alone and every plug-in on TRADES or AT, which are all parts once."""
    first = (next(base for base in ("trades", "at", "ard") if makes_sense(f"{base}+{name}")) for name in PLUGINS)
    quick = {*BASES, *(f"{base}+{name}" for base, name in zip(first, PLUGINS, strict=True))}
    return [method if method in quick else pytest.param(method, marks=pytest.mark.slow) for method in methods]


def bound(method: str, seed: int = 0) -> Objective:
    guests = {name: tiny(k) for k, name in enumerate(GUESTS, start=7)}
    return begun(Objective(parse(method), tiny(seed), guests, images=64).train())


def begun(objective: Objective) -> Objective:
    """Let it train as one that goes on within its first epoch: parts that look at each epoch's start have seen none."""
    objective.load_state_dict(objective.state_dict())
    objective.start_step(0.0)
    return objective


def views_of(objective: Objective, x: Tensor) -> Tensor:
    """Return images in place of adversarial ones, once for each augmentation that the method attacks."""
    x_adv = x.repeat(objective.method.augmentations, 1, 1, 1)
    for plugin in objective.method.plugins:
        plugin.attacked_from(0.9 * x_adv)
    return x_adv


def mirrored(objective: Objective, x: Tensor) -> Tensor:
    """Return images in place of the further augmentations: as many as the method asks for, or one that nobody reads."""
    return x.flip(3).repeat(max(1, objective.method.further), 1, 1, 1)


def losses(objective: Objective, steps: int) -> list[float]:
    """Train by plain SGD in float64; the loss of each step."""
    objective.double()
    x, y = batch()
    x = x.double()
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], 0.02, momentum=0.9)
    objective.start_epoch([(x, y)], progress=0.5)
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        second = mirrored(objective, x)
        x_adv = objective.perturb(x, y, Linf(), second=second, steps=2)
        loss = total(objective(x, x_adv, y, second, torch.arange(len(x))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_update()
        found.append(loss.item())
    return found


def step(objective: Objective, seed: int) -> float:
    """Go one step in the network's own precision, without its update; the loss."""
    x, y = batch()
    torch.manual_seed(seed)
    second = mirrored(objective, x)
    x_adv = objective.perturb(x, y, Linf(), second=second, steps=2)
    loss = total(objective(x, x_adv, y, second))
    loss.backward()
    return loss.item()
