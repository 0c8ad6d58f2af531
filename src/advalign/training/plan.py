"""What a training will do, planned and checked before anything is written: the run, and the guests it needs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from advalign import models
from advalign.data import Batches, Dataset, Extra, Images, hold_out, stratified_subset
from advalign.errors import UserError, require
from advalign.objectives import Method, Objective, total
from advalign.objectives.bases.contrast import Contrast
from advalign.objectives.bases.natural import Natural
from advalign.objectives.bases.trades import TRADES
from advalign.registration import source_digests
from advalign.runs import Run, Weights, find_weights
from advalign.runs.run import setting_digest
from advalign.runtime.files import digest
from advalign.runtime.seeds import seeded
from advalign.training.networks import build_objective
from advalign.training.recipes import Recipe

# The method that trains a guest which the user does not provide, with the student's architecture, data and recipe.
GUEST_METHODS: dict[str, Callable[[Method], Method]] = {
    "vanilla": lambda method: Method(Natural()),
    "robust": lambda method: Method(TRADES() if "robust" in Method(method.base).guests else method.base),
    "extractor": lambda method: Method(Contrast(vars(method.base)["temperature"])),
}
ATTACK_FIELDS = ("norm", "eps", "steps", "step_size", "start", "mode")


@dataclass(frozen=True)
class Plan:
    """A run to be trained, as a value; `plan` makes one and checks that it can be trained."""

    method: Method
    dataset: Dataset
    model: str
    recipe: Recipe
    runs: Path
    name: str | None
    guests: Mapping[str, Weights | Plan | None]
    """By the guest's name: a weights file, a run to be trained before, or None for one that learns with the student."""
    extra: Extra | None = None

    @cached_property
    def run(self) -> Run:
        """The run's folder, named by its setting.

        Raises:
            UserError: the folder holds another run, or something else.
        """
        setting = {
            "method": str(self.method),
            "data": self.dataset.name,
            "model": self.model,
            "classes": self.dataset.classes,
            "shape": self.dataset.shape,
            "images": self.dataset.digest,
            "recipe": asdict(self.recipe),
            "guests": {guest: _identity(source) for guest, source in self.guests.items()},
            **self._extra_digest,
            **_user_parts(self.method),
        }
        return Run.at(self.runs, json.loads(json.dumps(setting)), self.name)

    @cached_property
    def images(self) -> tuple[Images, Images]:
        """The training images, and the validation images held out of the training set; never the test set.

        Raises:
            UserError: the recipe takes more images than there are.
        """
        recipe, name = self.recipe, self.dataset.name
        held_out = recipe.validation or max(1, min(1000, len(self.dataset.train) // 10))
        rest, validation = hold_out(self.dataset.train, held_out, recipe.seed)
        if recipe.subset is not None:
            if recipe.subset > len(rest):
                raise UserError(
                    f"subset={recipe.subset} must be at most {len(rest)}, the training images of {name} "
                    f"without the {held_out} held out"
                )
            rest = stratified_subset(rest, recipe.subset, recipe.seed)
        require(
            len(rest) >= 2, lambda: f"{name} leaves {len(rest)} images to train on: hold out fewer with --validation"
        )
        return rest, validation

    def batches(self, images: Images) -> Batches:
        """Return the batches of the training images, on the device where these lie.

        Raises:
            UserError: a batch size that leaves no image of one kind to a batch.
        """
        r = self.recipe
        return Batches(
            images, r.batch_size, augment=r.augment, seed=r.seed, extra=self.extra, extra_share=r.extra_share
        )

    @property
    def card(self) -> dict[str, Any]:
        """What is written into the weights files about how they were made."""
        against = {"norm": self.recipe.norm, "eps": self.recipe.eps} if self.method.defends else {}
        return {
            "method": str(self.method),
            "data": self.dataset.name,
            "model": self.model,
            "classes": self.dataset.classes,
            "channels": self.dataset.shape[0],
            "shape": self.dataset.shape,
            "recipe": self.kind,
            **against,
            "epochs": self.recipe.epochs,
            "seed": self.recipe.seed,
            "training_images": len(self.images[0]),
            **self._extra_digest,
            "run": self.run.id,
        }

    @property
    def kind(self) -> str:
        """A digest that seeds of one method share: of recipe, extra data, the user's parts, and guests."""
        guests = {name: _kind(source) for name, source in self.guests.items()}
        return setting_digest(
            {**asdict(self.recipe), "seed": None, **self._extra_digest, **_user_parts(self.method), "guests": guests}
        )

    @property
    def space(self) -> int:
        """The bytes on disk: two weights files, the state with momentum, that once more while it is written, a log."""
        state = self.untrained_objective().learned_state()
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        return 6 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) + (1 << 20)

    @property
    def _extra_digest(self) -> dict[str, str]:
        # No key without extra data, so that runs from before there were any keep their names.
        return {} if self.extra is None else {"extra": self.extra.digest}

    def in_order(self) -> list[Plan]:
        """Return what is to be trained: nothing if the run is finished, else unfinished guests first, then the run."""
        if self.run.finished:
            return []
        guests = [each for guest in self.guests.values() if isinstance(guest, Plan) for each in guest.in_order()]
        return [*{each.run.id: each for each in guests}.values(), self]  # a guest of two parts is trained once

    def objective(self) -> Objective:
        """Build the networks, load the trained guests, and bind the method to them."""
        weights = {
            name: Weights(source.run.weights("best"), source.model) if isinstance(source, Plan) else source
            for name, source in self.guests.items()
        }
        return build_objective(self.method, self.model, self.dataset, self.recipe, weights)

    def untrained_objective(self) -> Objective:
        """Return the objective before any run is trained: guests of runs to come are as they are initialised."""
        weights = {name: None if isinstance(source, Plan) else source for name, source in self.guests.items()}
        return build_objective(self.method, self.model, self.dataset, self.recipe, weights)


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
    tried: set[object] | None = None,
) -> Plan:
    """Plan a run and those of its guests that the user does not provide, and check each; nothing is written.

    Args:
        guests: run folders or weights files by the guest's name.
        trust_model: whether functions may be called that the guests' files name as their architecture.
        tried: what earlier plans have tried, and what this one does; equal trials are made once. For studies, which
            plan the same guests, and every method with every seed, again and again.

    Raises:
        UserError: as `check`, or a guest that the method does not need or that cannot be made.
    """
    tried = set() if tried is None else tried
    for guest in guests:
        require(
            guest in method.guests,
            lambda: f"{method} takes no {guest} model; it needs {', '.join(method.guests) or 'none'}",
        )
    if not method.defends:  # what a natural run does not use must not name it, or guests would not be shared
        recipe = replace(recipe, **{f.name: f.default for f in fields(Recipe) if f.name in ATTACK_FIELDS})
    sources: dict[str, Weights | Plan | None] = {}
    for guest in method.guests:
        if guest in guests:
            sources[guest] = find_weights(guests[guest], trust_model=trust_model)
        elif guest in method.learners:
            sources[guest] = None
        else:
            require(guest in GUEST_METHODS, lambda: f"{method} needs a {guest} model, which has to be given")
            guest_method = GUEST_METHODS[guest](method)
            sources[guest] = plan(guest_method, dataset, model, recipe, runs=runs, guests={}, extra=extra, tried=tried)
    planned = Plan(method, dataset, models.canonical(model), recipe, runs, name, sources, extra)
    check(planned, tried)
    return planned


def check(planned: Plan, tried: set[object]) -> None:
    """Refuse a plan that cannot be trained, by a look at its folder and its images and by a trial step.

    Args:
        tried: the trials that need not be made again; this one is added.

    Raises:
        UserError: values out of range, a folder that holds something else, networks that do not fit each other or the
            data, or a step that fails.
    """
    recipe, dataset = planned.recipe, planned.dataset
    _ = recipe.threat, planned.run  # each of them refuses what makes no sense
    planned.batches(planned.images[0])
    parts = tuple((type(part), str(part)) for part in planned.method.parts)
    trial = (parts, planned.model, dataset.shape, dataset.classes, replace(recipe, seed=0))
    has_files = any(isinstance(guest, Weights) for guest in planned.guests.values())  # which may change on the disk
    if has_files or trial not in tried:
        try_step(planned)
        tried.add(trial)


def try_step(planned: Plan) -> None:
    """Make one training step without its update on blank images, in train mode as in the training.

    Raises:
        UserError: what the step raises, in one line.
    """
    objective, recipe, shape = planned.untrained_objective(), planned.recipe, planned.dataset.shape
    models.check_output(objective.student, shape, planned.dataset.classes)
    size = min(2, recipe.batch_size)
    x, y = torch.zeros(size, *shape), torch.zeros(size, dtype=torch.long)
    second = x if planned.method.second else None
    objective.train()
    try:
        with seeded(0):
            objective.start_epoch([(x, y)], progress=0.99)  # when everything that begins late has begun
            x_adv = objective.perturb(x, y, recipe.threat, second=second, steps=1, start=recipe.start)
            total(objective(x, x_adv, y, second)).backward()
    except UserError:
        raise
    except Exception as error:  # a user's forward may raise anything
        line = str(error).strip().partition("\n")[0]
        raise UserError(f"{planned.method} on {planned.model} fails: {type(error).__name__}: {line}") from error


def _user_parts(method: Method) -> dict[str, dict[str, str]]:
    """Identify the parts that are not the library's by their source, which may change under one name."""
    digests = source_digests(method.parts)
    return {"own": digests} if digests else {}


def _identity(source: Weights | Plan | None) -> str:
    """Return what stands for a guest in the setting: a run's id, or the digest of a file."""
    if source is None:
        return "learns"
    if isinstance(source, Plan):
        return source.run.id
    path = source.path
    if path.name == "best.safetensors" and (path.parent / "run.json").exists():
        run = Run.read(path.parent)
        if run.finished:  # so that a run provided as guest and the same run trained on the way are one
            return run.id
    return digest(path.read_bytes(), source.model or "", digits=10)


def _kind(source: Weights | Plan | None) -> list[str | None]:
    """Describe a guest but for its seed: runs with teachers of one kind are seeds of one method."""
    if source is None:
        return ["learns"]
    if isinstance(source, Plan):
        return [str(source.method), source.model, source.kind]
    card = source.read()[1]
    return [card[key] for key in ("method", "model", "recipe")] if "recipe" in card else [_identity(source)]
