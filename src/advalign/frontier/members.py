"""The networks of a dial as they are loaded, the images that none of them was trained on, and those that one was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from advalign.data import NAMES, Dataset, Images, load, stratified_subset
from advalign.data.pairs import Pair, as_images
from advalign.data.stored import joined, on_device
from advalign.errors import UserError, quoted, require
from advalign.evaluation.classes import ClassMatch
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.overlap import leave_out_seen
from advalign.evaluation.target import SUBSET_SEED, Target, load_target
from advalign.models.adapted import adapted
from advalign.models.modes import evaluating
from advalign.runs import Run, Weights, find_weights
from advalign.runtime.files import digest
from advalign.threats import Threat
from advalign.training.plan import split_training

HELD_OUT = 1000
"""Images on which the setting is chosen, at most."""


@dataclass(frozen=True)
class Material:
    """What a dial is made of."""

    members: tuple[Target, ...]
    """The robust network first."""
    held_out: Images
    """Images that none of them was trained on."""
    options: AttackOptions
    folder: Path
    """Of the result, for what is made once."""
    console: Console

    @property
    def nets(self) -> tuple[nn.Module, ...]:
        """The networks of the members."""
        return tuple(member.net for member in self.members)

    @property
    def two(self) -> tuple[nn.Module, nn.Module]:
        """The robust and the accurate network, where there are these two."""
        robust, accurate = self.nets
        return robust, accurate

    @cached_property
    def training(self) -> Images:
        """The images that the robust network was trained on; all training images of the data where that is not known.

        Held-out images are not among them.

        Raises:
            UserError: there are none.
        """
        robust = self.members[0]
        known = _trained_on(robust, robust.dataset)
        images = robust.dataset.train if known is None else known
        rows = np.flatnonzero(~np.isin(images.digests, self.held_out.digests))
        require(len(rows) > 0, lambda: f"{robust.dataset.name} has no training images, which this method needs")
        images = images.take(torch.from_numpy(rows))
        return on_device(robust.classes.relabel(images), robust.images.labels.device)

    @property
    def seen(self) -> list[Images]:
        """The images that were made use of: no command measures the made network on them."""
        return [self.held_out, *([self.training] if "training" in vars(self) else [])]


def gather(
    sources: Sequence[str | Path | Weights | nn.Module],
    held_out: int | str | Images | Pair,
    images: Images | Pair | None,
    threat: Threat | None,
    options: TargetOptions,
    console: Console,
    *,
    alone: bool,
) -> tuple[tuple[Target, ...], Images, str]:
    """Return the members of a dial on the test images, the images to choose on, and in words where these come from.

    Raises:
        UserError: as `load_members` and `held_out_images`; networks beside files, or without images and a threat model.
    """
    nets = [source for source in sources if isinstance(source, nn.Module)]
    files = [source for source in sources if not isinstance(source, nn.Module)]
    if not nets:
        require(
            images is None and threat is None and isinstance(held_out, int | str),
            "images and threat are for networks: name data and radius of runs and files in target_options",
        )
        assert isinstance(held_out, int | str)
        members = load_members(files, options, console, alone=alone)
        chosen_on, left, where = held_out_images(members, held_out, options, console)
        return tuple(replace(member, images=left) for member in members), chosen_on, where
    require(not files, lambda: f"name files or give networks, not both: {files[0]} is beside a network")
    if images is None or threat is None or isinstance(held_out, int | str):
        raise UserError("networks need images=(x, y) to be measured on, held_out=(x, y) to choose on, and threat=")
    require(alone or len(nets) > 1, "give the accurate network as well")
    chosen_on, test = as_images(held_out), as_images(images)
    both = int(np.isin(chosen_on.digests, test.digests).sum())
    require(not both, lambda: f"{both} of the held_out images are among the test images: choose on others")
    return network_members(nets, test, threat), chosen_on, "the images given for it"


def network_members(nets: Sequence[nn.Module], images: Images, threat: Threat) -> tuple[Target, ...]:
    """Return networks in memory as members: of no file, no training record and no names for their classes."""
    with torch.no_grad(), evaluating(nets[0]):
        classes = adapted(nets[0])(images.floats(slice(0, 1))).shape[1]
    names = tuple(map(str, range(classes)))
    dataset = Dataset("images", images.take(torch.arange(0)), images, names, named=False)
    match = ClassMatch(names, torch.arange(classes))
    return tuple(
        Target(
            net.eval(), images, threat, dataset, match, type(net).__name__, {}, Path(type(net).__name__),
            digest(*(tensor.detach().cpu().contiguous().numpy().data for tensor in net.state_dict().values())), "",
        )
        for net in nets
    )  # fmt: skip


def load_members(
    sources: Sequence[str | Path | Weights], options: TargetOptions, console: Console, *, alone: bool = False
) -> tuple[Target, ...]:
    """Load the robust network and those beside it on the same test images, in the robust one's threat model.

    Args:
        sources: the robust network's first; to it alone, the vanilla guest of its run is the second.
        alone: whether the robust network needs no other.

    Raises:
        UserError: as `load_target`; no accurate network is known, or two have other classes.
    """
    robust = find_weights(sources[0], options.checkpoint, model=options.model, trust_model=options.trust_model)
    others = [find_weights(source, trust_model=options.trust_model) for source in sources[1:]]
    weights = [robust, *(others or ([] if alone else [_vanilla_guest(robust)]))]
    for number, each in enumerate(weights):
        places = [(other.path.resolve(), other.part) for other in weights[:number]]
        require(
            (each.path.resolve(), each.part) not in places,
            lambda each=each: f"{each} is named twice: a robust network and another one are needed",
        )
    first = load_target(robust, options, console=console)
    shared = replace(options, data=first.dataset, model=None, norm=first.threat.norm, eps=first.threat.eps)
    targets = [first]
    for each in weights[1:]:
        targets.append(load_target(each, replace(shared, data=targets[-1].dataset), console=console))
    dataset = targets[-1].dataset  # without the test images that one of them has seen
    for number, (each, target) in enumerate(zip(weights, targets, strict=True)):
        if len(target.dataset.test) > len(dataset.test):
            again = replace(shared if number else options, data=dataset)
            targets[number] = load_target(each, again, console=console)
        _require_same_classes(robust, first, each, target)
    return tuple(targets)


def _require_same_classes(robust: Weights, first: Target, other: Weights, second: Target) -> None:
    names = first.classes.class_names, second.classes.class_names
    require(
        names[0] == names[1],
        lambda: f"other classes: {robust} has {quoted(names[0])}, and {other} has {quoted(names[1])}, in this order",
    )


def _vanilla_guest(weights: Weights) -> Weights:
    """Return the weights of the vanilla network that a robust run has learned from, beside its folder."""
    folder = weights.path.resolve().parent
    advice = f"name the accurate network, as in: advalign frontier {folder} ACCURATE"
    if not (folder / "run.json").is_file():
        raise UserError(f"{weights.path} has no run's folder that would tell its vanilla network: {advice}")
    run = Run.read(folder)
    identity = run.setting.get("guests", {}).get("vanilla")
    if identity is None:
        raise UserError(f"{folder} was trained by {run.setting['method']}, without a vanilla network: {advice}")
    for card in sorted(folder.parent.glob("*/run.json")):
        if card.parent.name.endswith(identity) and Run.read(card.parent).id == identity:
            return find_weights(card.parent)
    raise UserError(f"the vanilla network of {folder}, run {identity}, is not beside it: {advice}")


def held_out_images(
    members: Sequence[Target], source: int | str, options: TargetOptions, console: Console
) -> tuple[Images, Images, str]:
    """Return images to choose a setting on, the test images that are left, and where the former come from.

    Args:
        source: how many training images at most that no member was trained on; `test:N` for N test images that are then
            not measured; or another data set, all of whose test images are taken.

    Raises:
        UserError: there are no such images.
    """
    first = members[0]
    dataset, device = first.dataset, first.images.labels.device
    if isinstance(source, int) or source.isdecimal():
        most = int(source)
        require(most >= 1, lambda: f"--held-out {most} must be at least 1")
        unseen = _unseen(members)
        images = stratified_subset(unseen, min(most, len(unseen)), SUBSET_SEED)
        where = f"{len(images)} training images that neither network was trained on"
        return on_device(first.classes.relabel(images), device), first.images, where
    if source.startswith("test:"):
        return _of_test(first, source)
    other = load(source, directory=options.data_dir, image_size=dataset.shape[1])
    require(
        other.shape == dataset.shape and other.class_names == dataset.class_names,
        lambda: f"--held-out {source} must have the images' shape and the classes of {dataset.name}, in their order",
    )
    for member in members:
        other = leave_out_seen(other, member.path, member.card)
    known = np.isin(other.test.digests, dataset.test.digests)
    require(not known.any(), lambda: f"--held-out {source}: {int(known.sum())} of its images are test images as well")
    return on_device(first.classes.relabel(other.test), device), first.images, f"{len(other.test)} images of {source}"


def _of_test(target: Target, source: str) -> tuple[Images, Images, str]:
    """Set test images apart, as many as `test:N` says."""
    number, total = source.removeprefix("test:"), len(target.images)
    require(
        number.isdecimal() and 0 < int(number) < total,
        lambda: f"--held-out {quoted(source)}: N of test:N must be in 1 to {total - 1}, one less than the test images",
    )
    chosen = stratified_subset(target.images, int(number), SUBSET_SEED)
    taken = np.isin(target.images.digests, chosen.digests)  # copies of an image are on one side
    rest, apart = (target.images.take(torch.from_numpy(np.flatnonzero(side))) for side in (~taken, taken))
    return apart, rest, f"{len(apart)} test images that are set apart and in no other number"


def _unseen(members: Sequence[Target]) -> Images:
    """Return the images of the data set's training and validation sets that no member was trained on."""
    dataset = members[0].dataset
    parts = [part for part in (dataset.train, dataset.validation) if part is not None and len(part)]
    trained = [_trained_on(member, dataset) for member in members]
    apart = max(1, min(HELD_OUT, len(members[0].images) // 2))
    if not parts or any(each is None for each in trained):
        lacking = [member for member, each in zip(members, trained, strict=True) if each is None]
        whose = f"which images {lacking[0].path} was trained on is not known" if lacking else "there are none"
        raise UserError(
            f"no training images are known that neither network was trained on: {whose}. Choose on others: "
            f"--held-out test:{apart} sets so many test images apart, npz:FILE and folder-test:PATH name your own"
        )
    seen = np.concatenate([dataset.test.digests, *(each.digests for each in trained if each is not None)])
    every = joined(parts)
    unseen = torch.from_numpy(np.flatnonzero(~np.isin(every.digests, seen)))
    require(
        len(unseen) > 0,
        lambda: (
            f"every training image of {dataset.name} was trained on by one of the networks: choose on others, with "
            f"--held-out test:{apart}, npz:FILE or folder-test:PATH"
        ),
    )
    return every.take(unseen)


def _trained_on(member: Target, dataset: Dataset) -> Images | None:
    """Return the images that a run was trained on, without those it was selected on; None if unknown."""
    setting = setting_of(member)
    if "recipe" not in setting or setting.get("images") not in (dataset.digest, dataset.training_digest):
        return None
    recipe = setting["recipe"]
    by_content = dataset.name not in NAMES and setting["images"] == dataset.training_digest
    used, _ = split_training(
        dataset, recipe.get("validation"), recipe.get("subset"), recipe["seed"], by_content=by_content
    )
    return used


def setting_of(member: Target) -> Mapping[str, Any]:
    """Return the setting of the run whose folder holds a member's weights; empty if there is none."""
    folder = member.path.resolve().parent
    if "run" not in member.card or not (folder / "run.json").is_file():
        return {}
    return Run.read(folder).setting
