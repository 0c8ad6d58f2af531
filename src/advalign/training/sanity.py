"""Is a network any good at all? Guests before they teach and students when they are trained, on held-out images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from torch import Tensor, nn

from advalign import models
from advalign.data import Images
from advalign.data.stored import on_device
from advalign.errors import UserError
from advalign.evaluation.accuracy import evaluate
from advalign.evaluation.checks import beats_constant, no_better
from advalign.runs import Weights
from advalign.runtime.device import to_device
from advalign.runtime.progress import say
from advalign.training.loop import CALMER
from advalign.training.networks import load_guest, start_from
from advalign.training.plan import Plan

LIKELY = (
    "is it trained, on these classes in this order, for images in [0, 1] (a normalisation belongs inside the network)"
)
EXPLODED = 100  # times the loss of a constant prediction: far above any method's on a network that learns


@dataclass(frozen=True)
class Outcome:
    """What a training has come to."""

    warning: str = ""
    """What makes the student doubtful, in a sentence; empty for one that is better than a constant prediction."""
    diverged: bool = False


def judge(plan: Plan) -> Outcome:
    """Judge a training whose last epoch is done by clean accuracies on validation images.

    It has diverged if the last loss has exploded and the last student is no better than a constant prediction; it is
    doubtful if the best checkpoint is not.
    """
    rows, labels = [row for row in plan.run.log if "validation" in row], plan.images[1].labels
    last, best = rows[-1], max(rows, key=lambda row: tuple(row["validation"].values()))
    last_right, best_right = (round(row["validation"]["clean"] * len(labels)) for row in (last, best))
    exploded = last["loss"] > EXPLODED * math.log(plan.dataset.classes)
    if exploded and not beats_constant(last_right, labels):
        reason = f"the training diverged: loss {last['loss']:.3g}, clean accuracy {_of(last_right, labels)}"
        return Outcome(f"{reason}. {CALMER}", diverged=True)
    if beats_constant(best_right, labels):
        return Outcome()
    reason = f"the best checkpoint has a clean accuracy of {_of(best_right, labels)}"
    return Outcome(f"{reason}. Train longer, or look at the loss. {CALMER}")


def _of(right: int, labels: Tensor) -> str:
    """Say how many images with labels (N,) are classified correctly, and that it is no better than one answer."""
    return f"{100 * right / len(labels):.1f} % on {len(labels)} validation images, {no_better(right, labels)}"


def measure_guests(
    plan: Plan, names: Sequence[str], device: torch.device, console: Console, *, allow_weak: bool
) -> None:
    """Measure trained guests on the run's validation images, and say their clean accuracy, a line for each.

    Args:
        names: of the guests that are measured.
        allow_weak: whether a guest that the user has given may teach though it is no better than a constant prediction.
            One that was trained for the run always may, and the line says so.

    Raises:
        UserError: a given guest is no better, with the likely cause.
    """
    for name in names:
        weights = plan.trained_guests[name]
        assert weights is not None
        guest = load_guest(name, weights, plan.model, plan.dataset, plan.recipe)
        good, accuracy = _measured(guest, plan.images[1], device)
        line = f"the {name} model, {weights}: {accuracy}"
        if not good and isinstance(plan.guests[name], Weights) and not allow_weak:
            raise UserError(f"{line}; {LIKELY}? --allow-weak-guest takes it all the same")
        say(console, line if good else f"warning: {line}")


def measure_start(plan: Plan, device: torch.device, console: Console) -> None:
    """Measure the weights that the student starts from on the run's validation images, and say their accuracy."""
    if plan.init is not None:
        start = models.build(plan.model, classes=plan.dataset.classes, channels=plan.dataset.shape[0])
        start_from(start, plan.init, plan.model, plan.dataset)
        good, accuracy = _measured(start, plan.images[1], device)
        line = f"the student starts from {plan.init}: {accuracy}"
        say(console, line if good else f"warning: {line}; {LIKELY}?")


def _measured(net: nn.Module, validation: Images, device: torch.device) -> tuple[bool, str]:
    """Return whether a network is better than a constant prediction, and its clean accuracy in words."""
    right = int(evaluate(to_device(net, device).eval(), on_device(validation, device)).correct["clean"].sum())
    good, n = beats_constant(right, validation.labels), len(validation)
    accuracy = f"clean accuracy {100 * right / n:.1f} % on {n} validation images"
    return good, accuracy if good else f"{accuracy}, {no_better(right, validation.labels)}"
