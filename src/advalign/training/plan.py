"""What a training will do, worked out and tried before anything is written: the run, and the guests it needs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from advalign import models
from advalign.data import Batches, Dataset, Extra, Images, hold_out, stratified_subset
from advalign.errors import UserError, require
from advalign.objectives import Method, Objective, total
from advalign.objectives.bases.contrast import Contrast
from advalign.objectives.bases.natural import Natural
from advalign.objectives.bases.trades import TRADES
from advalign.runs import Run, Weights, find_weights, require_classes
from advalign.runs.checkpoint import load_into, load_weights
from advalign.runs.run import setting_digest
from advalign.runtime.files import digest
from advalign.runtime.seeds import seeded
from advalign.training.recipes import Recipe

# How a guest is made where none is given: by this method, with the student's architecture, data and recipe.
GUEST_METHODS: dict[str, Callable[[Method], Method]] = {
    "vanilla": lambda method: Method(Natural()),
    "robust": lambda method: Method(TRADES() if "robust" in Method(method.base).guests else method.base),
    "extractor": lambda method: Method(Contrast(vars(method.base)["temperature"])),
}


# What has worked in this process: a study plans the same guests, and every method with every seed, again and again.
_TRIED: set[tuple[object, ...]] = set()
ATTACK_FIELDS = ("norm", "eps", "steps", "step_size", "start", "mode")


@dataclass(frozen=True)
class Plan:
    """One run to be; its guests are weights files or plans of their own.

    Raises:
        UserError: anything that cannot work: unknown names, values out of range, networks that do not fit each other
            or the data, a folder that holds something else.
    """

    method: Method
    dataset: Dataset
    model: str
    recipe: Recipe
    runs: Path
    name: str | None
    guests: Mapping[str, Weights | Plan | None]  # None: it learns with the student, from scratch
    extra: Extra | None = None

    def __post_init__(self) -> None:
        _ = self.recipe.threat, self.run, self.images
        r = self.recipe
        Batches(
            self.images[0], r.batch_size, augment=r.augment, seed=r.seed, extra=self.extra, extra_share=r.extra_share
        )
        given = any(isinstance(guest, Weights) for guest in self.guests.values())  # a file may be another one by now
        parts = tuple((type(part), str(part)) for part in self.method.parts)
        trial = (parts, self.model, self.dataset.shape, self.dataset.classes, replace(r, seed=0))
        if given or trial not in _TRIED:
            models.check_output(self._blank.student, self.dataset.shape, self.dataset.classes)
            self._try()
            _TRIED.add(trial)

    def _try(self) -> None:
        """Make one training step without its update on blank images, in train mode as the fit will be."""
        size = min(2, self.recipe.batch_size)
        x, y = torch.zeros(size, *self.dataset.shape), torch.zeros(size, dtype=torch.long)
        second = x if self.method.second else None
        objective, threat = self._blank.train(), self.recipe.threat
        try:
            with seeded(0):
                objective.start_epoch([(x, y)], progress=0.99)  # when everything that begins late has begun
                x_adv = objective.perturb(x, y, threat, second=second, steps=1, start=self.recipe.start)
                total(objective(x, x_adv, y, second)).backward()
        except UserError:
            raise
        except Exception as error:  # somebody's forward may raise anything
            line = str(error).strip().partition("\n")[0]
            raise UserError(f"{self.method} on {self.model} fails: {type(error).__name__}: {line}") from error

    @cached_property
    def run(self) -> Run:
        """The run's folder, named by its setting."""
        setting = {
            "method": str(self.method),
            "data": self.dataset.name,
            "model": self.model,
            "classes": self.dataset.classes,
            "shape": self.dataset.shape,
            "images": self.dataset.digest,
            "recipe": asdict(self.recipe),
            "guests": {guest: _identity(source) for guest, source in self.guests.items()},
            **self._extra,
            **_own(self.method),
        }
        return Run.at(self.runs, json.loads(json.dumps(setting)), self.name)

    @cached_property
    def images(self) -> tuple[Images, Images]:
        """The training images, and the validation images held out of the training set; never the test set."""
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

    @property
    def card(self) -> dict[str, Any]:
        """What the weights files say of themselves."""
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
            **self._extra,
            "run": self.run.id,
        }

    @property
    def _extra(self) -> dict[str, str]:
        """What tells the run from one without extra data, which is to keep its name."""
        return {} if self.extra is None else {"extra": self.extra.digest}

    @property
    def kind(self) -> str:
        """What tells the run from others of its method beside the seed: recipe, extra data, own parts, and guests."""
        guests = {name: _kind(source) for name, source in self.guests.items()}
        return setting_digest(
            {**asdict(self.recipe), "seed": None, **self._extra, **_own(self.method), "guests": guests}
        )

    @property
    def space(self) -> int:
        """The bytes on disk: two weights files, the state with momentum, that once more while it is written, a log."""
        tensors = [value for value in self._blank.learned_state().values() if isinstance(value, torch.Tensor)]
        return 6 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) + (1 << 20)

    def in_order(self) -> list[Plan]:
        """Return what is to be trained: nothing if the run is finished, else unfinished guests first, then the run."""
        if self.run.finished:
            return []
        guests = [each for guest in self.guests.values() if isinstance(guest, Plan) for each in guest.in_order()]
        return [*{each.run.id: each for each in guests}.values(), self]  # a guest of two parts is trained once

    def bind(self) -> Objective:
        """Build the networks, load the guests, and compose the objective."""
        return self._compose({name: _weights(source) for name, source in self.guests.items()})

    @cached_property
    def _blank(self) -> Objective:
        """The objective as far as it is there: a guest still to be trained is as it was initialised."""
        return self._compose({k: None if isinstance(source, Plan) else source for k, source in self.guests.items()})

    def _compose(self, weights: Mapping[str, Weights | None]) -> Objective:
        guests = {name: self._guest(name, source) for name, source in weights.items()}
        student = self._network("student", self.model)
        return Objective(self.method, student, guests, self.recipe.label_smoothing).eval()

    def _guest(self, name: str, source: Weights | None) -> nn.Module:
        if source is None:
            return self._network(name, self.model)
        path = source.path
        state, card = load_weights(path)
        require_classes(path, card, self.dataset.classes, self.dataset.name)
        data = card.get("data", self.dataset.name)
        require(data == self.dataset.name, lambda: f"{path} was trained on {data}, not on {self.dataset.name}")
        net = self._network(name, source.architecture(card, typed=self.model) or self.model)
        try:
            load_into(net, state, str(path))
        except UserError as error:
            hint = f"; if its architecture is another, write --{name} MODEL@{path.name}"
            raise UserError(f"{error}{'' if source.model or card else hint}") from None
        models.check_output(net, self.dataset.shape, self.dataset.classes)
        return net

    def _network(self, role: str, model: str) -> nn.Module:
        with seeded(self.recipe.seed, role):
            return models.build(model, classes=self.dataset.classes, channels=self.dataset.shape[0])


def plan(
    method: Method,
    dataset: Dataset,
    model: str,
    recipe: Recipe,
    *,
    runs: Path,
    name: str | None = None,
    given: Mapping[str, str | Path],
    trust_model: bool = False,
    extra: Extra | None = None,
) -> Plan:
    """Plan a run and those of its guests that are not given.

    Args:
        trust_model: whether functions may be called that the given guests' files name as their architecture.

    Raises:
        UserError: as `Plan`, or a guest that the method does not need or that cannot be made.
    """
    for guest in given:
        require(
            guest in method.guests,
            lambda: f"{method} takes no {guest} model; it needs {', '.join(method.guests) or 'none'}",
        )
    if not method.defends:  # what a natural run does not use must not name it, or guests would not be shared
        recipe = replace(recipe, **{f.name: f.default for f in fields(Recipe) if f.name in ATTACK_FIELDS})
    guests: dict[str, Weights | Plan | None] = {}
    for guest in method.guests:
        if guest in given:
            guests[guest] = find_weights(given[guest], trust_model=trust_model)
        elif guest in method.learners:
            guests[guest] = None
        else:
            require(guest in GUEST_METHODS, lambda: f"{method} needs a {guest} model, which has to be given")
            own = GUEST_METHODS[guest](method)
            guests[guest] = plan(own, dataset, model, recipe, runs=runs, given={}, extra=extra)
    return Plan(method, dataset, models.canonical(model), recipe, runs, name, guests, extra)


def _own(method: Method) -> dict[str, dict[str, str]]:
    """Tell the parts that are not ours by their source, which may change under one name."""
    own = {part.name: type(part) for part in method.parts if not type(part).__module__.startswith("advalign.")}
    digests = {name: digest(_source(part), digits=10) for name, part in own.items()}
    return {"own": digests} if digests else {}


def _source(part: type) -> bytes:
    """Return the file in which a class is written or, of one that is in no file, what tells it from others."""
    try:
        return Path(inspect.getsourcefile(part) or "").read_bytes()
    except (OSError, TypeError):  # typed into a shell or a notebook
        return f"{part.__module__}:{part.__qualname__}".encode()


def _weights(source: Weights | Plan | None) -> Weights | None:
    return Weights(source.run.weights("best"), source.model) if isinstance(source, Plan) else source


def _identity(source: Weights | Plan | None) -> str:
    if source is None:
        return "learns"
    if isinstance(source, Plan):
        return source.run.id
    path = source.path
    if path.name == "best.safetensors" and (path.parent / "run.json").exists():
        run = Run.read(path.parent)
        if run.finished:  # then a guest that is given and one that was trained on the way are the same
            return run.id
    return digest(path.read_bytes(), source.model or "", digits=10)


def _kind(source: Weights | Plan | None) -> list[str | None]:
    """Tell a guest but for its seed: runs with teachers of one kind are seeds of one method."""
    if source is None:
        return ["learns"]
    if isinstance(source, Plan):
        return [str(source.method), source.model, source.kind]
    card = load_weights(source.path)[1]
    return [card[key] for key in ("method", "model", "recipe")] if "recipe" in card else [_identity(source)]
