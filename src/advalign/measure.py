"""Evaluation as a verb: take a run or a weights file, measure it on a test set, and write down records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from advalign import attacks, models
from advalign.data import Dataset, load, stratified_subset
from advalign.errors import UserError, require
from advalign.evaluation import WORST_CASE, Evaluation, evaluate
from advalign.runs import Record, append_records, require_classes, weights_of
from advalign.runs.checkpoint import load_into, load_weights
from advalign.runs.files import write_json
from advalign.runtime import environment, pick_device, place
from advalign.terminal import progress_bars, say
from advalign.threats import threat

SUBSET_SEED = 0  # one subset of the test set for all models, or their accuracies could not be compared


@dataclass(frozen=True, eq=False)
class Measurement:
    """An evaluation with its records, and the file that holds both."""

    records: list[Record]
    evaluation: Evaluation
    path: Path


def measure(
    source: str | Path,
    attack_names: Sequence[str] = ("standard",),
    *,
    checkpoint: str = "best",
    data: str | Dataset | None = None,
    model: str | None = None,
    n: int | None = None,
    norm: str | None = None,
    eps: float | None = None,
    batch_size: int = 512,
    precision: str = "fp32",
    seed: int = 0,
    device: str = "auto",
    data_dir: str | Path | None = None,
    image_size: int = 32,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Measurement:
    """Measure a run's checkpoint, or a weights file, on the test set.

    Args:
        source: a run folder or a weights file; a file from elsewhere also needs `model` and `data`.
        attack_names: spellings, or `standard` for the usual ones; none measures clean accuracy only.
        data, norm, eps: what the model was trained with, if not given; Linf(8/255) for naturally trained models.
        n: on this many test images, stratified, the same for every model; all if not given.
        out: folder of the result; `evaluations` in the run folder, or beside the weights file, if not given.

    Raises:
        UserError: anything that cannot work, before the evaluation starts.
    """
    path = weights_of(source, checkpoint)
    state, card = load_weights(path)
    spelled = _needed(model, card, "model", path)
    dataset = data if isinstance(data, Dataset) else None
    name = dataset.name if dataset else _needed(data, card, "data", path)
    budget = threat(norm or card.get("norm", "linf"), card.get("eps", 8 / 255) if eps is None else eps)
    chosen = [attacks.parse(text, threat=budget) for text in _expand(attack_names)]
    where = pick_device(device)
    dataset = dataset or load(str(name), directory=data_dir, image_size=image_size)
    require_classes(path, card, dataset.classes, dataset.name)
    net = models.build(spelled, classes=dataset.classes, channels=card.get("channels", dataset.shape[0]))
    load_into(net, state, str(path))
    models.check_output(net, dataset.shape, dataset.classes)
    if n is not None:
        require(1 <= n <= len(dataset.test), f"n={n} must be in 1 to {len(dataset.test)}, the test images of {name}")
    images = dataset.test if n is None else stratified_subset(dataset.test, n, SUBSET_SEED)
    net = place(net, where).eval()
    console = console or Console(quiet=True)
    if dataset.note:
        say(console, f"{dataset.name}: {dataset.note}")
    with progress_bars(console, "images") as bars:
        tasks = {k: bars.add_task(k, total=len(images)) for k in ("clean", *map(attacks.spelled, chosen))}
        evaluation = evaluate(
            net, images.to(where), chosen, batch_size=batch_size, precision=precision, seed=seed,
            advance=lambda attack, done: bars.advance(tasks[attack], done),
        )  # fmt: skip
    records = _records(evaluation, path, card, spelled, dataset, str(budget))
    folder = Path(out) if out else path.parent / "evaluations"
    settings = repr(
        (*map(attacks.spelled, chosen), str(budget), dataset.name, dataset.digest, len(images), precision, seed)
    )
    file = folder / f"{path.stem}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.json"
    write_json(file, _content(records, evaluation, dataset.note))
    if (path.parent / "run.json").exists():
        append_records(path.parent / "records.jsonl", records)
    return Measurement(records, evaluation, file)


def _needed(given: Any, card: dict[str, Any], key: str, path: Path) -> str:
    value = given or card.get(key)
    if value is None:
        raise UserError(f"{path} does not say its {key}: name it with --{key}")
    return str(models.canonical(value) if key == "model" else value)


def _expand(names: Sequence[str]) -> list[str]:
    expanded = [name for given in names for name in (attacks.STANDARD if given == "standard" else (given,))]
    return list(dict.fromkeys(name for name in expanded if name not in ("clean", "none")))


def _records(
    evaluation: Evaluation, path: Path, card: dict[str, Any], model: str, dataset: Dataset, budget: str
) -> list[Record]:
    here = environment()
    return [
        Record(
            method=card.get("method", ""),
            data=dataset.name,
            model=model,
            checkpoint=card.get("checkpoint", path.name),
            attack=name,
            threat=budget,
            accuracy=accuracy,
            n=len(evaluation),
            training_images=card.get("training_images", 0),
            epochs=card.get("epochs", 0),
            seed=card.get("seed", 0),
            run=card.get("run", ""),
            seconds=round(sum(evaluation.seconds.values()) if name == WORST_CASE else evaluation.seconds[name], 2),
            commit=here["commit"],
            torch=here["torch"],
            device=here["device"],
        )
        for name, accuracy in evaluation.accuracies().items()
    ]


def _content(records: list[Record], evaluation: Evaluation, note: str) -> dict[str, Any]:
    """Return the JSON of a measurement; outcomes are a digit an image, 1 where it is classified correctly."""
    outcomes = {k: "".join(map(str, flags.int().tolist())) for k, flags in evaluation.outcomes.items()}
    return {
        "records": [asdict(record) for record in records],
        "outcomes": outcomes,
        "note": note,
        "environment": environment(),
    }
