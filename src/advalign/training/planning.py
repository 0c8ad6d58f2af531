"""Plans are made here: the run, the guests that the user does not provide, and a trial step of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from advalign import models
from advalign.data import Dataset, Extra
from advalign.errors import UserError, require, shorten
from advalign.objectives import Method, total
from advalign.objectives.bases.contrast import Contrast
from advalign.objectives.bases.natural import Natural
from advalign.objectives.bases.trades import TRADES
from advalign.runs import Weights, find_weights
from advalign.runtime.seeds import seeded
from advalign.threats import check_radius, check_step_size
from advalign.training.attacks import PGD, Batch, check_attack, training_attack
from advalign.training.guard import remedies_for
from advalign.training.plan import Plan
from advalign.training.recipes import Recipe

# The method that trains a guest which the user does not provide, with the student's architecture, data and recipe.
GUEST_METHODS: dict[str, Callable[[Method], Method]] = {
    "vanilla": lambda method: Method(Natural()),
    "robust": lambda method: Method(TRADES() if "robust" in Method(method.base).guests else method.base),
    "extractor": lambda method: Method(Contrast(vars(method.base)["temperature"])),
}
ATTACK_FIELDS = ("norm", "eps", "attack", "steps", "step_size", "start", "mode", "guard")
OF_PGD = ("steps", "step_size", "start")
"""What the other training attacks do not use."""


TRIED = (
    *ATTACK_FIELDS, "average", "label_smoothing", "batch_size", "augment", "validation", "subset", "extra_share",
)  # fmt: skip
"""What images and a trial step depend on: cells of a study that differ elsewhere, as in the rate, need one together."""


def plan(
    method: Method,
    dataset: Dataset,
    model: str,
    recipe: Recipe,
    *,
    runs: Path,
    name: str | None = None,
    guests: Mapping[str, str | Path],
    trust_model: bool = False,
    extra: Extra | None = None,
    init: str | Path | None = None,
    tried: set[object] | None = None,
) -> Plan:
    """Plan a run and those of its guests that the user does not provide, and check each; nothing is written.

    Args:
        guests: run folders or weights files by the guest's name.
        trust_model: whether functions may be called that the guests' files name as their architecture.
        init: a run folder or weights file that the student starts from; guests that are trained do not.
        tried: what earlier plans have tried, and what this one does; equal trials are made once. For studies, which
            plan the same guests, and every method with every seed, again and again.

    Raises:
        UserError: as `check`, or a guest that the method does not need or that cannot be made.
    """
    tried = set() if tried is None else tried
    for guest in guests:
        require(
            guest in method.guests,
            lambda: f"{shorten(str(method))} takes no {guest} model; it needs {', '.join(method.guests) or 'none'}",
        )
    for starts in filter(None, (part.init_from for part in method.parts)):
        require(
            init is None,
            lambda: (
                f"{shorten(str(method))} starts from its {starts} model: give that, --guest {starts}=SOURCE, not --init"
            ),
        )
    if not method.defends:  # what a natural run does not use must not name it, or guests would not be shared
        recipe = replace(recipe, **_defaults(ATTACK_FIELDS))
    attack = training_attack(recipe)
    if isinstance(attack, PGD):  # one spelling; what an attack does not use must not name the run
        recipe = recipe if recipe.attack == PGD.name else replace(recipe, attack=PGD.name)
    else:
        recipe = replace(recipe, attack=str(attack), **_defaults(OF_PGD))
    require(
        not recipe.guard or not method.defends or bool(remedies_for(attack)),
        lambda: f"guard=True has nothing stronger to take than --attack {recipe.attack} with {attack.passes:g} steps",
    )
    if recipe.guard == attack.guarded:
        recipe = replace(recipe, guard=None)
    check_attack(attack, method, recipe, extra=extra is not None)
    sources: dict[str, Weights | Plan | None] = {}
    for guest in method.guests:
        if guest in guests:
            sources[guest] = find_weights(guests[guest], trust_model=trust_model)
        elif guest in method.learners:
            sources[guest] = None
        else:
            require(
                guest in GUEST_METHODS,
                lambda: f"{shorten(str(method))} needs a {guest} model, which has to be given: --guest {guest}=SOURCE",
            )
            guest_method = GUEST_METHODS[guest](method)
            its = replace(recipe, average="none") if recipe.average == "method" else recipe  # a guest keeps none
            sources[guest] = plan(guest_method, dataset, model, its, runs=runs, guests={}, extra=extra, tried=tried)
    start = None if init is None else find_weights(init, trust_model=trust_model)
    planned = Plan(method, dataset, models.canonical(model), recipe, runs, name, sources, extra, start)
    check(planned, tried)
    return planned


def _defaults(names: Sequence[str]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(Recipe) if field.name in names}


def check(planned: Plan, tried: set[object]) -> None:
    """Refuse a plan that cannot be trained, by a look at its folder and its images and by a trial step.

    Args:
        tried: the trials that need not be made again; this one is added.

    Raises:
        UserError: values out of range, a folder that holds something else, networks that do not fit each other or the
            data, or a step that fails.
    """
    recipe, dataset = planned.recipe, planned.dataset
    threat, _ = recipe.threat, planned.run  # each of them refuses what makes no sense
    check_radius(threat, dataset.shape)
    if recipe.step_size is not None:
        check_step_size("recipe", recipe.step_size, threat)
    parts = tuple((type(part), str(part)) for part in planned.method.parts)
    about_data = (dataset.name, dataset.shape, dataset.classes)
    trial = (parts, planned.model, *about_data, *(getattr(recipe, name) for name in TRIED))
    files = [*planned.guests.values(), planned.init]  # which may change on the disk
    has_files = any(isinstance(file, Weights) for file in files)
    if has_files or trial not in tried:
        batches = planned.batches(planned.images[0])
        if planned.method.reads_rows:
            next(batches.rows(0))
        try_step(planned)
        tried.add(trial)


def try_step(planned: Plan) -> None:
    """Make one training step without its update on blank images, in train mode as in the training.

    Raises:
        UserError: what the step raises, in one line.
    """
    objective, recipe, shape = planned.untrained_objective(), planned.recipe, planned.dataset.shape
    models.check_output(objective.student, shape, planned.dataset.classes)
    require(
        not objective.method.exports_average or recipe.average in ("none", "method"),
        lambda: (
            f"{shorten(str(objective.method))}: its model is an average of its learners: "
            f"average={recipe.average} must be none or method"
        ),
    )
    if recipe.average == "method":
        models.check_output(objective.average, shape, planned.dataset.classes)
    require(
        any(parameter.requires_grad for parameter in objective.student.parameters()),
        lambda: f"{planned.model} has no weight to train: requires_grad is off for every parameter",
    )
    size = min(2, recipe.batch_size)
    x, y = torch.zeros(size, *shape), torch.zeros(size, dtype=torch.long)
    second = x.repeat(planned.method.further, 1, 1, 1) if planned.method.second else None
    rows = torch.arange(size) if planned.method.reads_rows else None
    objective.train()
    try:
        with seeded(0):
            objective.start_epoch([(x, y)], progress=0.99)  # when everything that begins late has begun
            attack = training_attack(recipe)
            if isinstance(attack, PGD) or attack.placed:
                x_adv = objective.perturb(x, y, recipe.threat, second=second, steps=1, start=recipe.start)
            else:
                x_adv = attack.perturb(objective, Batch(x, y, second), recipe.threat, None, recipe.mode)
            total(objective(x, x_adv, y, second, rows)).backward()
    except UserError:
        raise
    except Exception as error:  # a user's forward may raise anything
        line = str(error).strip().partition("\n")[0]
        method = shorten(str(planned.method))
        raise UserError(f"{method} on {planned.model} fails: {type(error).__name__}: {line}") from error
