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
from advalign.runs import Record, Run, append_records, require_classes, weights_of
from advalign.runs.checkpoint import load_into, load_weights
from advalign.runs.files import require_folder, write_json
from advalign.runtime import autocast, environment, pick_device, place
from advalign.terminal import progress_bars, say
from advalign.threats import Threat, threat

# What a record takes over from the weights' card, and what stands for it in weights from elsewhere.
_ORIGIN = {"method": "", "training_images": 0, "epochs": 0, "recipe": "", "seed": 0, "run": ""}
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
    image_size: int | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Measurement:
    """Measure a run's checkpoint, or a weights file, on the test set.

    Args:
        source: a run folder or a weights file; a file from elsewhere also needs `model` and `data`.
        attack_names: spellings, or `standard` for the usual ones; none measures clean accuracy only.
        data, norm, eps: what the model was trained with, if not given; Linf(8/255) for naturally trained models.
        image_size: side of the images of `folder:PATH`; what the model was trained on if not given.
        n: on this many test images, stratified, the same for every model; all if not given.
        out: folder of the result; `evaluations` in the run folder, or beside the weights file, if not given.

    Raises:
        UserError: anything that cannot work, before the evaluation starts.
    """
    path = weights_of(source, checkpoint)
    state, card = load_weights(path)
    spelled = _needed(model, card, "model", path)
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    budget = _budget(norm, eps, card)
    chosen = [attacks.parse(text, threat=budget) for text in _expand(attack_names)]
    where = pick_device(device)
    autocast(where, precision)
    folder = Path(out) if out else path.parent / "evaluations"
    require_folder(folder)
    shape = tuple(card.get("shape", ()))
    if not isinstance(data, Dataset):
        size = image_size or (shape[1] if shape else 32)
        data = load(_needed(data, card, "data", path), directory=data_dir, image_size=size)
    dataset = data
    require(
        not shape or shape == dataset.shape,
        f"images of {dataset.name} have shape {dataset.shape}, but {path} was trained on {shape}",
    )
    require_classes(path, card, dataset.classes, dataset.name)
    net = models.build(spelled, classes=dataset.classes, channels=dataset.shape[0])
    load_into(net, state, str(path))
    models.check_output(net, dataset.shape, dataset.classes)
    many = len(dataset.test)
    require(n is None or 1 <= n <= many, f"n={n} must be in 1 to {many}, the test images of {dataset.name}")
    images = dataset.test if n is None else stratified_subset(dataset.test, n, SUBSET_SEED)
    net = place(net, where).eval()
    console = console or Console(quiet=True)
    if "run" in card and (path.parent / "run.json").exists() and not (run := Run.read(path.parent)).finished:
        card["epochs"], whole = len(run.log), card["epochs"]
        say(console, f"{path.parent} is not finished: it stands at epoch {card['epochs']} of {whole}")
    if dataset.note:
        say(console, f"{dataset.name}: {dataset.note}")
    with progress_bars(console, "images") as bars:
        tasks = {k: bars.add_task(k, total=len(images)) for k in ("clean", *map(attacks.spelled, chosen))}
        evaluation = evaluate(
            net, images.to(where), chosen, batch_size=batch_size, precision=precision, seed=seed,
            advance=lambda attack, done: bars.advance(tasks[attack], done),
        )  # fmt: skip
    here = environment()
    provenance = {
        **{key: card.get(key, default) for key, default in {**_ORIGIN, "checkpoint": path.name}.items()},
        "data": dataset.name,
        "images": dataset.digest,
        "model": spelled,
        "threat": str(budget),
        "n": len(images),
        "precision": precision,
        "attack_seed": seed,
        "batch_size": batch_size,
        **{key: here[key] for key in ("commit", "torch", "device")},
    }
    records = _records(evaluation, provenance)
    measured = repr([*map(attacks.spelled, chosen), *provenance.items()])
    file = folder / f"{path.stem}-{hashlib.sha256(measured.encode()).hexdigest()[:8]}.json"
    write_json(file, _content(records, evaluation, dataset.note))
    if (path.parent / "run.json").exists():
        append_records(path.parent / "records.jsonl", records)
    return Measurement(records, evaluation, file)


def _budget(norm: str | None, eps: float | None, card: dict[str, Any]) -> Threat:
    """Return the threat that is asked for; a radius without its norm is taken from the card, never another norm's."""
    trained = card.get("norm", "linf")
    if eps is None and norm not in (None, trained):
        raise UserError(f"--norm {norm} needs its radius, --eps: the model was trained in {trained}")
    return threat(norm or trained, card.get("eps", 8 / 255) if eps is None else eps)


def _needed(given: Any, card: dict[str, Any], key: str, path: Path) -> str:
    value = given or card.get(key)
    if value is None:
        raise UserError(f"{path} does not say its {key}: name it with --{key}")
    return str(models.canonical(value) if key == "model" else value)


def _expand(names: Sequence[str]) -> list[str]:
    expanded = [name for given in names for name in (attacks.STANDARD if given == "standard" else (given,))]
    return list(dict.fromkeys(name for name in expanded if name not in ("clean", "none")))


def _records(evaluation: Evaluation, provenance: dict[str, Any]) -> list[Record]:
    attacked = [name for name in evaluation.correct if name != "clean"]
    names = {WORST_CASE: f"worst({', '.join(attacked)})"}
    seconds = {**evaluation.seconds, WORST_CASE: sum(evaluation.seconds.values())}
    return [
        Record(**provenance, attack=names.get(name, name), accuracy=accuracy, seconds=round(seconds[name], 2))
        for name, accuracy in evaluation.accuracies().items()
    ]


def _content(records: list[Record], evaluation: Evaluation, note: str) -> dict[str, Any]:
    """Return the JSON of a measurement; outcomes are a digit an image, 1 where it is classified correctly."""
    outcomes = {k: "".join(map(str, flags.int().tolist())) for k, flags in evaluation.correct.items()}
    return {
        "records": [asdict(record) for record in records],
        "outcomes": outcomes,
        "note": note,
        "environment": environment(),
    }
