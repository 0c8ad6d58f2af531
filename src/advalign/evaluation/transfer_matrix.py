"""The transfer matrix: every model shown the adversarial images that were made on every other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rich.console import Console

from advalign.errors import require
from advalign.evaluation.accuracy import Evaluation, evaluate
from advalign.evaluation.measure import Target, load_target, parse_attacks, transfer_examples
from advalign.evaluation.transfer import transferable
from advalign.report.tables import Table
from advalign.runs import find_weights
from advalign.runs.checkpoint import load_weights
from advalign.runtime.environment import environment
from advalign.runtime.files import digest, require_writable, write_atomically, write_json
from advalign.runtime.progress import say
from advalign.threats import Linf, Threat, make_threat

T = TypeVar("T")

BATCH_SIZE = 512


class Matrix(NamedTuple):
    """The matrix as a table, and the JSON file that holds every image's outcome."""

    table: Table
    path: Path


def transfer_matrix(
    sources: Sequence[str | Path],
    attack: str = "pgd(steps=20)",
    *,
    data: str | None = None,
    n: int | None = None,
    norm: str | None = None,
    eps: float | None = None,
    data_dir: str | Path | None = None,
    device: str = "auto",
    trust_model: bool = False,
    out: str | Path = "transfer",
    console: Console | None = None,
) -> Matrix:
    """Show every model the adversarial images that were made on every other; a row for each surrogate.

    All cells are of one threat model and one test set. They are written to a folder of their own and not to the runs'
    records, where a column for each surrogate would widen every later table. The examples are kept beside their
    surrogate's weights.

    Args:
        sources: run folders, weights files, or `MODEL@FILE` of weights from elsewhere.
        attack: a spelling of one that can go on to its last step: `transfer.TRANSFERABLE`.
        data: what the models were trained on, if not given.
        n: on this many test images, stratified, the same for every model; all if not given.
        norm, eps: what the models were trained against, if not given; those trained naturally take the others'.
        trust_model: whether functions may be called that the files name as their architecture.
        out: folder of the matrix as JSON, Markdown and LaTeX.

    Raises:
        UserError: fewer than two sources, sources of different threats or data, or as `measure`.
    """
    console = console or Console(quiet=True)
    require(len(sources) > 1, "name at least two models to transfer between")
    asked = parse_attacks([attack], Linf())  # what fails in any threat is refused before the models are read
    require(len(asked) == 1, lambda: f"{attack!r} must be one attack")
    transferable(asked[0])
    weights = {str(source): find_weights(source, trust_model=trust_model) for source in sources}
    for folder in (Path(out), *(each.path.parent / "transfer" for each in weights.values())):
        require_writable(folder)
    cards = {source: load_weights(each.path)[1] for source, each in weights.items()}
    require(len(cards) == len(sources), lambda: f"a model is named twice in {' '.join(map(str, sources))}")
    threat = _threat(cards, norm, eps)
    chosen = parse_attacks([attack], threat)
    where = data or _common({source: card["data"] for source, card in cards.items() if "data" in card}, "--data")
    models: dict[str, Target] = {}
    for source, each in weights.items():
        models[source] = load_target(
            each, data=next(iter(models.values())).dataset if models else where, n=n, norm=threat.norm,
            eps=threat.eps, device=device, data_dir=data_dir, console=console,
        )  # fmt: skip
    made = {
        source: transfer_examples(model, chosen, console, batch_size=BATCH_SIZE, precision="fp32", seed=0)
        for source, model in models.items()
    }
    given = {source: examples[str(chosen[0])] for source, examples in made.items()}
    found = {}
    for source, model in models.items():
        found[source] = evaluate(model.net, model.images, given=given, batch_size=BATCH_SIZE)
        say(console, f"shown to {source}")
    return _written(Path(out), str(chosen[0]), models, found)


def _threat(cards: Mapping[str, dict[str, Any]], norm: str | None, eps: float | None) -> Threat:
    """Return the one threat model of all cells."""
    against = {source: make_threat(card["norm"], card["eps"]) for source, card in cards.items() if "eps" in card}
    if eps is None:
        trained = _common(against, "--eps") or Linf(8 / 255)
        asked = norm or trained.norm
        require(
            asked == trained.norm,
            lambda: f"--norm {norm} needs its radius, --eps: the models were trained in {trained}",
        )
        return trained
    return make_threat(norm or _common({k: each.norm for k, each in against.items()}, "--norm") or "linf", eps)


def _common(values: Mapping[str, T], flag: str) -> T | None:
    """Return the value that all have, or None where there is none.

    Raises:
        UserError: two differ.
    """
    (first, value), *others = values.items() or [("", None)]
    for source, other in others:
        require(
            other == value, lambda: f"{first} was trained with {value}, {source} with {other}: say which with {flag}"
        )
    return value


def _written(folder: Path, attack: str, models: Mapping[str, Target], found: Mapping[str, Evaluation]) -> Matrix:
    first = next(iter(models.values()))
    last = [Path(source).name for source in models]
    names = last if len({*last}) == len(last) else list(models)
    share = {target: {k: f"{100 * v:.1f}" for k, v in each.accuracies().items()} for target, each in found.items()}
    rows = [(name, *(share[target][source] for target in models)) for name, source in zip(names, models, strict=True)]
    rows.append(("(clean images)", *(share[target]["clean"] for target in models)))
    setting = {
        "attack": attack,
        "threat": str(first.threat),
        "data": first.dataset.name,
        "images": first.dataset.digest,
        "n": len(first.images),
        "batch_size": BATCH_SIZE,
        "models": {
            source: {
                "method": model.method,
                "model": model.model,
                "weights": model.digest,
                "run": model.card.get("run"),
            }
            for source, model in models.items()
        },
    }
    table = Table(
        ("made on", *names),
        tuple(rows),
        frozenset(),
        f"Accuracy in % of each column's model on images made by {attack}, to the last step, on each row's; threat: "
        f"{first.threat}; data: {first.dataset.name}; test images: {len(first.images)}.",
    )
    outcomes = {
        target: {name: "".join(map(str, flags.int().tolist())) for name, flags in each.correct.items()}
        for target, each in found.items()
    }
    file = folder / f"matrix-{digest(repr(setting), digits=8)}.json"
    write_json(file, {**setting, "outcomes": outcomes, "environment": environment()})
    write_atomically(file.with_suffix(".md"), table.markdown() + "\n")
    write_atomically(file.with_suffix(".tex"), table.latex() + "\n")
    return Matrix(table, file)
