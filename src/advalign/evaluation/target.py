"""What is measured: a trained network, loaded with the test images and the threat model that it is measured in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from advalign import models
from advalign.data import Dataset, Images, describe, load, stratified_subset
from advalign.data.stored import on_device
from advalign.errors import UserError, require
from advalign.evaluation.classes import ClassMatch, match_classes
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.overlap import leave_out_seen
from advalign.runs import Run, Weights, find_weights
from advalign.runs.sizes import count_classes
from advalign.runtime.device import pick_device, to_device
from advalign.runtime.files import digest_of_file
from advalign.runtime.progress import say
from advalign.threats import Threat, check_radius, make_threat

SUBSET_SEED = 0  # one subset of the test set for all models, or their accuracies could not be compared


@dataclass(frozen=True, eq=False)
class Target:
    """A network in eval mode with the test images and the threat model that it is measured in, all on one device."""

    net: nn.Module
    images: Images
    threat: Threat
    dataset: Dataset
    """As it was loaded; the labels of `images` are the model's."""
    classes: ClassMatch
    model: str
    """The architecture's spelling."""
    card: dict[str, Any]
    """What the weights file says about itself; of an unfinished run, with the number of epochs trained so far."""
    path: Path
    """The weights file."""
    digest: str
    """Of the weights file."""
    part: str
    """Which of several state dicts in it; mostly empty."""

    @property
    def label(self) -> str:
        """Method, architecture, and the run's id with its progress if unfinished, or the digest of the weights."""
        return f"{self.method} {self.model} {self.card.get('run', self.digest[:10])}{self.card.get('stands', '')}"

    @property
    def method(self) -> str:
        """What the network was trained with, or the file's name with what was taken of it."""
        return self.card.get("method", f"{self.path.name}#{self.part}" if self.part else self.path.name)

    @property
    def note(self) -> str:
        """What a reader of results must know of the data and their classes."""
        return "; ".join(filter(None, (self.dataset.note, self.classes.note(self.dataset.test))))


def load_target(
    source: str | Path | Weights,
    options: TargetOptions | None = None,
    *,
    keep_seen: bool = False,
    console: Console | None = None,
) -> Target:
    """Load a network, its test images and its threat model.

    Args:
        source: a run folder, a weights file, or `MODEL@FILE`.
        keep_seen: whether test images stay that the network was trained on, for a surrogate, which is not measured.
        console: where to print what the user should know about the run or the data.

    Raises:
        UserError: the parts do not fit together, or one is missing.
    """
    options, console = options or TargetOptions(), console or Console(quiet=True)
    weights = find_weights(source, options.checkpoint, model=options.model, trust_model=options.trust_model)
    path = weights.path
    stored, card = weights.read()
    model = _architecture(weights, card)
    require(
        not (options.mean and card),
        lambda: f"{path} was trained on images in [0, 1]: mean and std are for weights without a training record",
    )
    threat, device = _threat(options, card), pick_device(options.device)
    whole = load_dataset(options, path, card, console)
    unsaid = "classes" not in card and not len(whole.train)  # test images alone may lack classes
    outputs = count_classes(stored, model, whole.shape[0]) if unsaid else None
    classes = match_classes(path, card, whole, outputs)
    dataset = whole if keep_seen else leave_out_seen(whole, path, card)
    net = _build(model, weights, stored, dataset.shape, len(classes.class_names), options)
    check_radius(threat, dataset.shape)
    total = len(dataset.test)
    within = options.n is None or options.n <= total
    require(within, lambda: f"n={options.n} must be in 1 to {total}, the test images of {dataset.name}")
    images = dataset.test if options.n is None else stratified_subset(dataset.test, options.n, SUBSET_SEED)
    if "run" in card and (path.parent / "run.json").exists() and not (run := Run.read(path.parent)).finished:
        card["epochs"], planned = len(run.log), card["epochs"]
        card["stands"] = f" at epoch {card['epochs']}"
        doubt = f"warning: {path.parent}: {run.warning}"
        unfinished = f"{path.parent} is not finished: {card['epochs']} of {planned} epochs are done"
        say(console, doubt if run.warning else unfinished)
    images = on_device(classes.relabel(images), device)
    target = Target(
        to_device(net, device).eval(), images, threat, dataset, classes, model, card, path, digest_of_file(path),
        weights.part,
    )  # fmt: skip
    for note in filter(None, (dataset.note.removeprefix(whole.note).removeprefix("; "), classes.note(dataset.test))):
        say(console, f"{dataset.name}: {note}")
    return target


def _architecture(weights: Weights, card: dict[str, Any]) -> str:
    model, path = weights.architecture(card), weights.path
    if model is None:
        raise UserError(f"{path} does not say its model: write MODEL@{path}, as in resnet18@{path}, or --model MODEL")
    return models.canonical(model)


def _threat(options: TargetOptions, card: dict[str, Any]) -> Threat:
    """Return the threat model asked for; without a radius, that of training, if it has the same norm."""
    trained = card.get("norm", "linf")
    if options.eps is None and options.norm not in (None, trained):
        raise UserError(f"--norm {options.norm} needs its radius, --eps: the model was trained in {trained}")
    return make_threat(options.norm or trained, card.get("eps", 8 / 255) if options.eps is None else options.eps)


def load_dataset(options: TargetOptions, path: Path, card: dict[str, Any], console: Console) -> Dataset:
    """Load the data set, unless it is at hand, say what it is, and compare it with what the network was trained on.

    Raises:
        UserError: the data are not known, are no longer in their place, or have images of another shape.
    """
    shape = tuple(card.get("shape", ()))
    dataset = options.data or card.get("data")
    if dataset is None:
        raise UserError(f"{path} does not say its data: name them with --data")
    if not isinstance(dataset, Dataset):
        kind, colon, place = str(dataset).partition(":")
        require(
            options.data is not None or not colon or Path(place).exists(),
            lambda: f"{dataset}, on which {path} was trained, is not there: name its new place, --data {kind}:PATH",
        )
        size = options.image_size or (shape[1] if shape else 32)
        dataset = load(str(dataset), directory=options.data_dir, image_size=size)
        for line in describe(dataset):
            say(console, line)
        if dataset.held_out and kind == "folder" and dataset.name != card.get("data"):
            others = _other_images(dataset, place)
            say(console, f"  measured: the {len(dataset.test)} held-out images; --data folder-test:{others}")
    require(
        not shape or shape == dataset.shape,
        lambda: f"images of {dataset.name} have shape {dataset.shape}, but {path} was trained on {shape}",
    )
    return dataset


def _other_images(dataset: Dataset, place: str) -> str:
    """Return which folder to name to measure others than the held-out images: the user's validation split, or all."""
    split = dataset.sources.get("validation", "").removeprefix("from ").rstrip("/")
    return f"{place}/{split} takes those of {split}/" if split and Path(place, split).is_dir() else f"{place} takes all"


def _build(
    model: str, weights: Weights, stored: Any, shape: tuple[int, int, int], classes: int, options: TargetOptions
) -> nn.Module:
    """Build the network, which reads images in [0, 1], and try it on one."""
    channels, mean = shape[0], tuple(options.mean)
    net = models.build(model, classes=classes, channels=channels)
    weights.load_into(net, stored, normalized=bool(mean))
    if mean:
        require(len(mean) == channels, lambda: f"mean={mean} must have one value for each of {channels} channels")
        net = models.Normalized(net, mean, options.std)
    models.check_output(net, shape, classes)
    return net
