"""Learning rate and momentum as functions of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math

import numpy as np

from advalign.training.recipes import Recipe

_START, _END = 25, 25e4  # one cycle: lr/25 at first, lr/25e4 at last, the defaults of torch's OneCycleLR


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step, counted from 0 over the whole run."""
    r, epoch = recipe, step // steps_per_epoch
    if epoch < r.warmup:
        return r.lr / 5
    if r.schedule == "piecewise":
        # The tiny tolerance keeps a milestone such as 74/76 from slipping by an epoch through rounding.
        return r.lr * (1 / r.lr_factor) ** sum(epoch + 1e-6 >= milestone * r.epochs for milestone in r.milestones)
    if r.schedule == "linear":
        rates = [r.lr / r.lr_factor**k for k in range(len(r.milestones))]
        return float(np.interp((epoch + 1) / r.epochs, r.milestones, rates))
    if r.schedule == "cosine":
        return r.lr * (1 + math.cos(math.pi * step / (r.epochs * steps_per_epoch))) / 2
    if r.schedule == "onecycle":
        return _one_cycle(r, step, steps_per_epoch, low=r.lr / _START, high=r.lr, end=r.lr / _END)
    return r.lr


def momentum(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Return the momentum of a step; it moves only where one cycle swings it."""
    if recipe.schedule == "onecycle" and recipe.cycle_momentum:
        return _one_cycle(recipe, step, steps_per_epoch, low=0.95, high=0.85, end=0.95)
    return recipe.momentum


def _one_cycle(recipe: Recipe, step: int, steps_per_epoch: int, *, low: float, high: float, end: float) -> float:
    last = recipe.epochs * steps_per_epoch - 1
    turn = recipe.peak * (last + 1) - 1
    if step < turn:
        return _cosine(low, high, step / turn)
    return _cosine(high, end, (step - turn) / (last - turn))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
