"""The transfer matrix: every model shown the adversarial images that were made on every other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from advalign.attacks import Attack
from advalign.attacks.spelled import parse_attacks
from advalign.attacks.targets import check_class_order
from advalign.data import Dataset
from advalign.errors import require
from advalign.evaluation.accuracy import Evaluation, evaluate
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.overlap import leave_out_seen
from advalign.evaluation.target import Target, load_dataset, load_target
from advalign.evaluation.transfer import transfer_examples, transferable
from advalign.registration import register_attacks
from advalign.runs import find_weights
from advalign.runtime.files import require_writable
from advalign.runtime.progress import say
from advalign.threats import Linf, Threat, make_threat

T = TypeVar("T")

ATTACK_OPTIONS = AttackOptions()  # the same for every matrix


@dataclass(frozen=True, eq=False)
class TransferMatrix:
    """What every model gets right of the images that one attack made on each: `evaluations[target].correct[source]`."""

    attack: Attack
    """Its threat model is that of all cells."""
    models: Mapping[str, Target]
    """The models by what the user named them."""
    evaluations: Mapping[str, Evaluation]
    """By target; the outcomes are `clean` and the sources on which the images were made."""

    @property
    def dataset(self) -> Dataset:
        """The data set of all cells."""
        return next(iter(self.models.values())).dataset

    @property
    def n(self) -> int:
        """The number of test images of every cell."""
        return len(next(iter(self.models.values())).images)


def transfer_matrix(
    sources: Sequence[str | Path],
    attack: str = "pgd(steps=20)",
    options: TargetOptions | None = None,
    *,
    console: Console | None = None,
) -> TransferMatrix:
    """Show every model the adversarial images that were made on every other.

    All cells share one threat model and one test set. The results do not go to the records of the runs, where a column
    for each surrogate would widen every later table. The examples are kept beside their surrogate's weights.

    Args:
        sources: run folders, weights files, or `MODEL@FILE` of weights that do not name their architecture.
        attack: the spelling of one whose examples carry over to other networks.
        options: of every model. What is not given is what the models were trained with; models that were trained
            without attacks take the threat model of the others.

    Raises:
        UserError: fewer than two sources, sources of different threat models or data, or as `measure`.
    """
    options, console = options or TargetOptions(), console or Console(quiet=True)
    require(len(sources) > 1, "name at least two models to transfer between")
    # In any threat model, since what fails in each of them is refused before the models are read.
    attacks = parse_attacks([register_attacks(attack)], Linf())
    require(len(attacks) == 1, lambda: f"{attack!r} must be one attack")
    transferable(attacks[0])
    weights = {
        str(source): find_weights(source, options.checkpoint, model=options.model, trust_model=options.trust_model)
        for source in sources
    }
    for each in weights.values():
        require_writable(each.path.parent / "transfer")
    cards = {source: each.read()[1] for source, each in weights.items()}
    for source, each in weights.items():
        each.architecture(cards[source])  # refuses a file that is not trusted, before data are loaded
    require(len(cards) == len(sources), lambda: f"a model is named twice in {' '.join(map(str, sources))}")
    threat = _threat(cards, options.norm, options.eps)
    trained_on = {source: card["data"] for source, card in cards.items() if "data" in card}
    shared = replace(options, data=options.data or _common(trained_on, "--data"), norm=threat.norm, eps=threat.eps)
    for source, each in weights.items():  # what one model has seen is left out for all
        dataset = load_dataset(shared, each.path, cards[source], console)
        shared = replace(shared, data=leave_out_seen(dataset, each.path, cards[source]))

    models = {source: load_target(each, shared, keep_seen=True, console=console) for source, each in weights.items()}
    chosen = attacks[0].with_threat(threat)
    first = next(iter(models.values()))
    for model in models.values():
        check_class_order([chosen], model.classes.class_names, first.classes.class_names)
    examples = {
        source: transfer_examples(model, [chosen], ATTACK_OPTIONS, console)[str(chosen)]
        for source, model in models.items()
    }
    evaluations = {}
    for source, model in models.items():
        evaluations[source] = evaluate(
            model.net, model.images, precomputed=examples, batch_size=ATTACK_OPTIONS.batch_size
        )
        say(console, f"shown to {source}")
    return TransferMatrix(chosen, models, evaluations)


def _threat(cards: Mapping[str, dict[str, Any]], norm: str | None, eps: float | None) -> Threat:
    """Return the one threat model of all cells."""
    trained = {source: make_threat(card["norm"], card["eps"]) for source, card in cards.items() if "eps" in card}
    if eps is None:
        threat = _common(trained, "--eps") or Linf(8 / 255)
        require(
            norm in (None, threat.norm),
            lambda: f"--norm {norm} needs its radius, --eps: the models were trained in {threat}",
        )
        return threat
    return make_threat(norm or _common({k: each.norm for k, each in trained.items()}, "--norm") or "linf", eps)


def _common(values: Mapping[str, T], flag: str) -> T | None:
    """Return the value that all have, or None if there is none.

    Raises:
        UserError: two differ.
    """
    (first, value), *others = values.items() or [("", None)]
    for source, other in others:
        require(
            other == value, lambda: f"{first} was trained with {value}, {source} with {other}: say which with {flag}"
        )
    return value
