"""What a training will do, as a value: the run, and the guests it needs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from advalign.data import NAMES, Batches, Dataset, Extra, Images, hold_out, stratified_subset
from advalign.data.held_out import hold_out_validation
from advalign.data.images import content_order, require_training, stratified_split
from advalign.errors import UserError, require
from advalign.objectives import Method, Objective
from advalign.registration import source_digests
from advalign.runs import Run, Weights
from advalign.runs.run import setting_digest
from advalign.runtime import ranks
from advalign.runtime.files import digest, read_content
from advalign.training.attacks import training_attack
from advalign.training.guard import is_guarded
from advalign.training.networks import build_objective
from advalign.training.recipes import Recipe


@dataclass(frozen=True)
class Plan:
    """A run to be trained; `plan` of `advalign.training.planning` makes one and checks that it can be trained."""

    method: Method
    dataset: Dataset
    model: str
    recipe: Recipe
    runs: Path
    name: str | None
    guests: Mapping[str, Weights | Plan | None]
    """By the guest's name: a weights file, a run to be trained before, or None for one that learns with the student."""
    extra: Extra | None = None
    init: Weights | None = None
    """What the student starts from."""

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
            "images": self.dataset.digest if self.dataset.name in NAMES else self.dataset.training_digest,
            "recipe": self.recipe.setting,
            "guests": {guest: _identity(source) for guest, source in self.guests.items()},
            **self._extra_digest,
            **({} if self.init is None else {"init": _identity(self.init)}),
            **_sources_and_revisions(self.method),
            **({"class_names": self.dataset.class_names} if self.dataset.sources else {}),
        }
        known = [setting, *([] if self.dataset.name in NAMES else [{**setting, "images": self.dataset.digest}])]
        setting, *earlier = json.loads(json.dumps(known))
        return Run.at(self.runs, setting, self.name, earlier)

    @property
    def _by_content(self) -> bool:
        """Whether draws and order follow the content of the images: the user's own, but in runs of earlier versions."""
        return self.dataset.name not in NAMES and self.run.setting["images"] == self.dataset.training_digest

    @cached_property
    def images(self) -> tuple[Images, Images]:
        """The training images, and the validation images, which are never of the test set.

        The validation images are those that the user has set apart, or as many of them as the recipe says, drawn
        stratified; where there are none, they are held out of the training images. What is drawn of the user's own data
        follows their content and the seed, not their order.

        Raises:
            UserError: the recipe takes more images than there are.
        """
        recipe = self.recipe
        return split_training(self.dataset, recipe.validation, recipe.subset, recipe.seed, by_content=self._by_content)

    def batches(self, images: Images) -> Batches:
        """Return this rank's batches of the training images, on the device where these lie.

        Raises:
            UserError: a batch size that leaves no image of one kind to a batch.
        """
        r, order = self.recipe, content_order(self.images[0]) if self._by_content else None
        return Batches(
            images, r.batch_size, augment=r.augment, seed=r.seed, extra=self.extra, extra_share=r.extra_share,
            order=order, further_augment=self.method.further_augment, rank=ranks.rank(), world=ranks.world(),
        )  # fmt: skip

    @property
    def card(self) -> dict[str, Any]:
        """What is written into the weights files about how they were made."""
        against = {"norm": self.recipe.norm, "eps": self.recipe.eps} if self.method.defends else {}
        return {
            "method": str(self.method),
            "data": self.dataset.name,
            "model": self.model,
            "classes": self.dataset.classes,
            **self.about_data,
            **({"images": self.run.setting["images"]} if self.dataset.sources else {}),
            "channels": self.dataset.shape[0],
            "shape": self.dataset.shape,
            "recipe": self.kind,
            **against,
            "epochs": self.recipe.epochs,
            "seed": self.recipe.seed,
            "training_images": len(self.images[0]),
            **self._extra_digest,
            **({} if self.init is None else {"init": _identity(self.init)}),
            "run": self.run.id,
        }

    @property
    def about_data(self) -> dict[str, Any]:
        """The names of the classes, where they have any, and what was done to the images before they were stored."""
        names = {"class_names": list(self.dataset.class_names)} if self.dataset.named else {}
        steps = {"preprocessing": dict(self.dataset.preprocessing)} if self.dataset.preprocessing else {}
        return {**names, **steps}

    @property
    def kind(self) -> str:
        """A digest that seeds of one method share: of recipe, extra data, the user's parts, guests, and the start."""
        guests = {name: _kind(source) for name, source in self.guests.items()}
        init = {} if self.init is None else {"init": _kind(self.init)}
        return setting_digest(
            {
                **self.recipe.setting,
                "seed": None,
                **self._extra_digest,
                **_sources_and_revisions(self.method),
                "guests": guests,
                **init,
            }
        )

    @property
    def space(self) -> int:
        """The bytes on disk: two weights files, the state with momentum, that once more while it is written, a log.

        The guard keeps one more state; an attack that remembers perturbations keeps them in each. And there are 8 bytes
        for the digest of each generated image.
        """
        state = self.untrained_objective().learned_state()
        tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        states = 2 + is_guarded(self.recipe, training_attack(self.recipe))
        return (2 + 2 * states) * weights + states * self.remembered + self._extra_digests + (1 << 20)

    @property
    def remembered(self) -> int:
        """The bytes of the perturbations that the training attack keeps for each image."""
        channels, height, width = self.dataset.shape
        each = channels * (height + 8) * (width + 8)
        return 2 * len(self.images[0]) * each if training_attack(self.recipe).placed else 0

    @property
    def _extra_digests(self) -> int:
        """The bytes of the digests of generated images."""
        return 8 * (0 if self.extra is None else len(self.extra))

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

    def with_guests(self) -> list[Plan]:
        """Return this run behind all that its guests need, finished or not."""
        guests = [each for guest in self.guests.values() if isinstance(guest, Plan) for each in guest.with_guests()]
        return [*{each.run.id: each for each in guests}.values(), self]

    def objective(self) -> Objective:
        """Build the networks, load the trained guests, and bind the method to them."""
        return build_objective(self.method, self.model, self.dataset, self.recipe, self.trained_guests, self.init)

    @property
    def trained_guests(self) -> dict[str, Weights | None]:
        """The guests' weights when their runs are finished; None for one that learns with the student."""
        return {
            name: Weights(source.run.weights("best"), source.model) if isinstance(source, Plan) else source
            for name, source in self.guests.items()
        }

    def untrained_objective(self) -> Objective:
        """Return the objective before any run is trained: guests of runs to come are as they are initialised."""
        weights = {name: None if isinstance(source, Plan) else source for name, source in self.guests.items()}
        return build_objective(self.method, self.model, self.dataset, self.recipe, weights, self.init)


def _sources_and_revisions(method: Method) -> dict[str, dict[str, Any]]:
    """Identify what may change under one name: the user's parts by their source, the library's by their revision."""
    revisions = {part.name: part.revision for part in method.parts if part.revision}
    named = {"own": source_digests(method.parts), "revisions": revisions}
    return {key: parts for key, parts in named.items() if parts}


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
    part = f"#{source.part}" if source.part else ""
    return digest(read_content(path), f"{source.model or ''}{part}", digits=10)


def _kind(source: Weights | Plan | None) -> list[str | None]:
    """Describe a guest but for its seed: runs with teachers of one kind are seeds of one method."""
    if source is None:
        return ["learns"]
    if isinstance(source, Plan):
        return [str(source.method), source.model, source.kind]
    card = source.read()[1]
    return [card[key] for key in ("method", "model", "recipe")] if "recipe" in card else [_identity(source)]


def split_training(
    dataset: Dataset, validation: int | None, subset: int | None, seed: int, *, by_content: bool
) -> tuple[Images, Images]:
    """Return the images that a recipe trains on, and those that it selects on; see `Plan.images`.

    Args:
        validation, subset, seed: of the recipe.
        by_content: whether draws follow the content of the images and not their order.

    Raises:
        UserError: the recipe takes more images than there are.
    """
    require_training(dataset)
    name = dataset.name
    if dataset.validation is None:
        total = len(dataset.train)
        held_out = validation or max(1, min(1000, total // 10))
        require(
            held_out < total,
            lambda: f"validation={held_out} must be below {total}, the training images of {name}: set --validation",
        )
        draw = hold_out_validation if by_content else hold_out
        rest, selected = draw(dataset.train, held_out, seed)
        held_out = len(selected)
    else:
        held_out, rest, selected = 0, dataset.train, dataset.validation
        if validation is not None:
            require(
                validation <= len(selected),
                lambda: (
                    f"validation={validation} must be at most {len(selected)}, the validation images of "
                    f"{name}: set --validation"
                ),
            )
            selected = _subset(selected, validation, seed, by_content=by_content)
    if by_content:
        selected = selected.take(content_order(selected))
    if subset is not None:
        if subset > len(rest):
            raise UserError(
                f"subset={subset} must be at most {len(rest)}, the training images of {name}"
                + (f" without the {held_out} held out" if held_out else "")
                + ": set --subset"
            )
        rest = _subset(rest, subset, seed, by_content=by_content)
    require(len(rest) >= 2, lambda: f"{name} leaves {len(rest)} images to train on: hold out fewer with --validation")
    return rest, selected


def _subset(images: Images, size: int, seed: int, *, by_content: bool) -> Images:
    """Draw `size` of the images, stratified by class."""
    if not by_content:
        return stratified_subset(images, size, seed)
    order = content_order(images)
    return images.take(order[stratified_split(images.labels.cpu()[order], size, seed)[1]])
