"""What is said of the guests that are trained for a run, before the work begins."""

from __future__ import annotations

from math import ceil

from advalign.errors import shorten
from advalign.runtime.progress import format_duration
from advalign.training.attacks import NFGSM, PGD, training_attack
from advalign.training.plan import Plan

LONG = 300.0
"""Seconds above which a training is worth a word on what would be faster."""
UPDATE = 5
"""Passes of an update about, where a backward one counts for two: 3 of AT, 7 of TRADES; an attack step has 3."""


def guest_lines(planned: Plan) -> list[str]:
    """Return a line for each guest that nobody has given: where it is, or how it is trained first, and how long about.

    The time is that of the passes through the network; what teachers and plug-ins add is left out.
    """
    if planned.run.finished:
        return []
    method, lines = shorten(str(planned.method)), []
    for name, guest in planned.guests.items():
        if not isinstance(guest, Plan):
            continue
        if guest.run.finished:
            lines.append(f"the {name} model of {method} is trained: {guest.run.path}")
            continue
        share = _passes(guest) / _passes(planned)
        time = "as long as" if share >= 0.95 else f"{share:.0%} of the time of"
        lines += [
            *guest_lines(guest),
            f"{method} needs a {name} model, and none is given (--guest {name}=SOURCE): first "
            f"{shorten(str(guest.method))} is trained, with the same data, model and recipe ({_epochs(guest)}), "
            f"in about {time} {method}: {guest.run.path}",
        ]
    return list(dict.fromkeys(lines))


def time_line(planned: Plan, step_seconds: float, left: int, steps: int) -> str:
    """Return how long a training will take, from the time of a step, and what would be faster.

    Args:
        left: steps still to come.
        steps: of an epoch.
    """
    attack, recipe = training_attack(planned.recipe), planned.recipe
    now, cheap = (UPDATE + 3 * each.passes for each in (attack, NFGSM()))
    seconds = step_seconds * left
    if isinstance(attack, PGD) and planned.method.defends:  # which may take more steps later
        to_come = range(recipe.epochs - ceil(left / steps), recipe.epochs)
        costs = [UPDATE + 3 * attack.steps_of(epoch, recipe.epochs) for epoch in to_come]
        seconds *= sum(costs) / len(costs) / costs[0]
    line = f"about {format_duration(seconds)}: {step_seconds:.2g} s a step, {steps} steps an epoch"
    if planned.method.defends and seconds > LONG and cheap < now / 2:
        line += f"; --attack n-fgsm, which is weaker, takes about {cheap / now:.0%} of it"
    return f"{line}. Validation and start-up come on top"


def _epochs(planned: Plan) -> str:
    done, epochs = len(planned.run.log), planned.recipe.epochs
    return f"{epochs} epoch{'s' * (epochs != 1)}{f', {done} done' if done else ''}"


def _passes(planned: Plan) -> float:
    """Return the passes through the student for each batch."""
    return 1 + training_attack(planned.recipe).passes * planned.method.defends
