"""Where trained networks come from: a run folder, a weights file, or `MODEL@FILE`. Files are data, never programs.

Of a file that holds several state dicts, `FILE#PART` names one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from advalign import models
from advalign.data import Dataset
from advalign.errors import UserError, nearly_alike, quoted, require, unknown
from advalign.runs.checkpoint import FETCH_AGAIN, load_into, load_weights
from advalign.runs.run import Run
from advalign.runs.sizes import count_channels, count_classes, likely_classes
from advalign.runs.zoo import PREFIX, zoo_model
from advalign.runtime.near import near_path

_log = logging.getLogger("advalign")
_noted: set[str] = set()  # what was taken of which file


class Weights(NamedTuple):
    """A weights file, and what the user says of it."""

    path: Path
    model: str | None = None
    """Its architecture; if None, what the file says."""
    trusted: bool = False
    """Whether a function that the file names as its architecture may be called."""
    part: str = ""
    """Which of several state dicts in the file; if empty, the only one that fits."""
    zoo: str = ""
    """The published model that it is, by its key; mostly empty."""

    def __str__(self) -> str:
        return f"{self.path}#{self.part}" if self.part else str(self.path)

    def read(self) -> tuple[Any, dict[str, Any]]:
        """Read what the file holds, and its card; weights in a run's folder must be that run's own.

        Raises:
            UserError: the file is damaged, of a newer version, or of another run.
        """
        state, card = load_weights(self.path)
        if self.zoo:
            return state, zoo_model(self.zoo).card()
        folder = self.path.parent
        if self.path.name in ("best.safetensors", "last.safetensors") and (folder / "run.json").is_file():
            run = Run.read(folder).id
            require(
                card.get("run", run) == run,
                lambda: f"{self.path} belongs to run {card['run']}, not to {run}: {FETCH_AGAIN}",
            )
            checkpoint = self.path.stem
            require(
                card.get("checkpoint", checkpoint) == checkpoint,
                lambda: f"{self.path} holds the checkpoint {card['checkpoint']}, not {checkpoint}: {FETCH_AGAIN}",
            )
        return state, card

    def load_into(self, net: nn.Module, stored: Any, *, normalized: bool = False) -> None:
        """Copy what fits of the file's content into a network; see `advalign.runs.checkpoint.load_into`.

        What was taken is noted once, where that is not the whole file as it is.

        Raises:
            UserError: nothing fits, or several state dicts do.
        """
        taken = load_into(net, stored, str(self.path), part=self.part, normalized=normalized)
        note = f"{self.path}: {taken}"
        if taken and note not in _noted:
            _noted.add(note)
            _log.warning("note: %s", note)

    def architecture(self, card: Mapping[str, Any], typed: str = "") -> str | None:
        """Return the spelling of the network to build: the user's, else the one in the file's card, if it has one.

        A card that names `package.module:function` would run that function, so it is refused unless the user trusts
        the file or has typed the same function.

        Args:
            card: what the weights file says of itself.
            typed: a model that the user has typed for another network of the same command.

        Raises:
            UserError: the card names a function that the user has not typed, or is no string.
        """
        if self.model is not None:
            return self.model
        named = card.get("model")
        require(named is None or isinstance(named, str), lambda: f"{self.path} is damaged: its card's model is no text")
        if named is not None and not self.trusted and models.function_of(named) != models.function_of(typed):
            require_builtin(str(named), self.path)
        return named


def require_builtin(model: str, file: Path) -> None:
    """Refuse a file that names a user's function as its network: to build it would run a program.

    Raises:
        UserError: the function, and what to do if the file is to be trusted.
    """
    require(
        not models.function_of(model),
        lambda: (
            f"{file} names its network as {model!r}, a function that would be run: if you trust the file, add "
            "--trust-model (trust_model=True in Python), or name the network yourself, as in --model or MODEL@FILE"
        ),
    )


def find_weights(
    source: str | Path | Weights, checkpoint: str = "best", *, model: str | None = None, trust_model: bool = False
) -> Weights:
    """Find the weights of a run folder, a weights file, `MODEL@FILE`, or `zoo:NAME@FILE` of a published model.

    Args:
        checkpoint: `best` or `last`, of a run folder.
        model: the architecture, where the user names it; it counts more than that of `MODEL@FILE`.
        trust_model: whether a function that the file names as its architecture may be called.

    Raises:
        UserError: neither a run folder nor a file, no such checkpoint yet, or an unknown model.
    """
    if isinstance(source, Weights):
        return source
    if str(source).startswith(PREFIX) and not Path(source).exists():
        return _published(str(source), model)
    named, path = _split(str(source))
    chosen = model or named
    file, _, part = path.rpartition("#")
    if Path(path).exists() or not Path(file).is_file():
        file, part = path, ""
    architecture = None if chosen is None else models.canonical(chosen)
    return Weights(_file(file, checkpoint), architecture, trust_model, part)


def _published(source: str, model: str | None) -> Weights:
    """Return the weights of `zoo:NAME@FILE`, whose architecture the name tells."""
    key, _, file = source.removeprefix(PREFIX).partition("@")
    entry = zoo_model(key)
    require(bool(file), lambda: f"{source} needs the file that you have: write {source}@FILE")
    require(model is None, lambda: f"{PREFIX}{key} says its architecture: leave out --model {quoted(str(model))}")
    path, _, part = file.rpartition("#")
    path, part = (path, part) if path and Path(path).is_file() and not Path(file).exists() else (file, "")
    return Weights(_file(path, "best"), models.canonical(entry.model), part=part, zoo=key)


def _split(source: str) -> tuple[str | None, str]:
    """Return the model and the path of `MODEL@FILE`; of a path alone, no model. Paths may contain `@`."""
    heads = (source[:at] for at, sign in enumerate(source) if sign == "@")
    model = next((head for head in heads if head.count("(") == head.count(")")), None)
    if model is None or Path(source).exists() or "/" in model.partition("(")[0]:
        return None, source
    return model, source[len(model) + 1 :]


def _file(source: str | Path, checkpoint: str) -> Path:
    path = Path(source)
    if checkpoint not in ("best", "last"):
        raise unknown("checkpoint", checkpoint, ("best", "last"))
    if path.is_dir():
        weights = Run.read(path).weights(checkpoint)
        require(weights.is_file(), lambda: f"{path} has no {checkpoint} checkpoint yet: train it first")
        return weights
    require(path.is_file(), lambda: f"no run folder or weights file {str(source)!r}{_hint(path)}")
    return path


def _hint(path: Path) -> str:
    """Return the end of a message on a path that leads nowhere, which may be a network without a file of weights."""
    head = str(path).partition("(")[0]
    if head in models.MODELS or re.fullmatch(r"[\w.]+:\w+", head):
        return f": it is a network, whose weights are named as in {path}@FILE"
    return near_path(path)


def require_classes(path: Path, card: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse weights of a model that has not the classes of the data set, in their order.

    Raises:
        UserError: both numbers of classes, or the first name that differs.
    """
    count, names = card.get("classes", dataset.classes), tuple(card.get("class_names", ()))
    require(
        count == dataset.classes,
        lambda: f"wrong number of classes: {path} has {count}, the data set {dataset.name} has {dataset.classes}",
    )
    both = zip(names, dataset.class_names, strict=False) if dataset.named else ()
    for number, (its, ours) in enumerate(both):
        require(
            its == ours,
            lambda: (
                f"other classes: number {number} is {quoted(its)} in {path}, but {quoted(ours)} in {dataset.name}; "
                f"they must have the same names in the same order{nearly_alike([ours], [its])}"
            ),
        )


def load(
    source: str | Path | Weights, checkpoint: str = "best", *, model: str | None = None, trust_model: bool = False
) -> nn.Module:
    """Load a trained network, in eval mode, from a run folder or a weights file, of a run or from elsewhere.

    Example:
        >>> import advalign as aa
        >>> recipe = aa.Recipe(epochs=1, steps=1, subset=64, validation=16)
        >>> run = aa.train("at", data="digits", model="small-cnn(width=2)", recipe=recipe)
        >>> net = aa.load(run.path)

    Args:
        source: a run folder, a weights file, or `MODEL@FILE`; `FILE#PART` of a file with several state dicts.
        checkpoint: `best` or `last`, of a run folder.
        model: the architecture; if None, the one that the file names. Weights from elsewhere name none; the numbers of
            classes and channels are then those of their shapes.
        trust_model: whether a function that the file names as its architecture, `package.module:function`, may be
            called. Without it such a file is refused, since to load it would run a program.

    Raises:
        UserError: no such run or file, a damaged one, or weights of unknown or untrusted architecture.
    """
    weights = find_weights(source, checkpoint, model=model, trust_model=trust_model)
    stored, card = weights.read()
    if not card:
        card = _card_by_shapes(weights, stored)
    for key, kind in (("model", str), ("classes", int), ("channels", int)):
        known = isinstance(card.get(key), kind)
        require(known, lambda: f"{weights.path} is damaged or not of advalign: its card does not tell {key}")
    spelling = weights.architecture(card)
    assert spelling is not None
    net = models.build(spelling, classes=card["classes"], channels=card["channels"])
    weights.load_into(net, stored)
    return net.eval()


def _card_by_shapes(weights: Weights, stored: Any) -> dict[str, Any]:
    """Return what must be known to build the network of weights from elsewhere, whose model the user has named."""
    model, channels = weights.model, count_channels(stored)
    if model is None:
        raise UserError(
            f"{weights.path} does not say which architecture it is: write MODEL@FILE, as in resnet18@{weights.path}, "
            "or name it with --model (model= in Python)"
        )
    classes = count_classes(stored, model, channels) or likely_classes(stored)
    return {"model": model, "classes": classes, "channels": channels}
