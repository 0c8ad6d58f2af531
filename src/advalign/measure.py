"""Evaluation as a verb: take a run or a weights file, measure it on a test set, and write down records."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from advalign import attacks, models
from advalign.data import Dataset, Images, load, stratified_subset
from advalign.errors import UserError, require
from advalign.evaluation import WORST_CASE, Evaluation, Given, evaluate
from advalign.runs import Record, Run, append_records, require_classes, weights_of
from advalign.runs.checkpoint import load_into, load_weights
from advalign.runs.files import require_folder, write_atomically, write_json
from advalign.runtime import autocast, environment, pick_device, place
from advalign.terminal import progress_bars, say
from advalign.threats import THREATS, Linf, Threat, threat
from advalign.transfer import crafted, place_of

# What a record takes over from the weights' card, and what stands for it in weights from elsewhere.
_ORIGIN = {"method": "", "training_images": 0, "epochs": 0, "recipe": "", "seed": 0, "run": ""}
SUBSET_SEED = 0  # one subset of the test set for all models, or their accuracies could not be compared


@dataclass(frozen=True, eq=False)
class Measurement:
    """An evaluation with its records, and the file that holds both."""

    records: list[Record]
    evaluation: Evaluation
    path: Path
    extra_data: bool


@dataclass(frozen=True, eq=False)
class Subject:
    """A network in eval mode with the test images and the threat that it is measured with, all on one device."""

    net: nn.Module
    images: Images
    threat: Threat
    dataset: Dataset
    model: str
    """The architecture's spelling."""
    card: dict[str, Any]
    """What the weights file says about itself; of an unfinished run, with the epochs that it has."""
    path: Path
    """The weights file."""


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
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    surrogate: str | Path | None = None,
    out: str | Path | None = None,
    save_examples: bool = False,
    console: Console | None = None,
) -> Measurement:
    """Measure a run's checkpoint, or a weights file, on the test set; one that was interrupted goes on.

    Args:
        source: a run folder or a weights file; a file from elsewhere also needs `model` and `data`.
        attack_names: spellings, or `standard` for the usual ones; none measures clean accuracy only.
        data, norm, eps: what the model was trained with, if not given; Linf(8/255) for naturally trained models.
        image_size: side of the images of `folder:PATH`; what the model was trained on if not given.
        n: on this many test images, stratified, the same for every model; all if not given.
        mean, std: of each channel, for weights from elsewhere whose network reads normalised images.
        surrogate: a run folder or weights file of another model: the attacks are made on it, once, kept beside its
            weights, and shown to the source. Its threat, data and images are the source's.
        out: folder of the result; `evaluations` in the run folder, or beside the weights file, if not given.
        save_examples: also write the adversarial images of each attack, beside the result as `.npz`.

    Raises:
        UserError: anything that cannot work, before the evaluation starts.
    """
    console = console or Console(quiet=True)
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    where = pick_device(device)
    autocast(where, precision)
    for text in _expand(attack_names):
        attacks.parse(text, threat=Linf())  # data may take a download: what is misspelt in any threat is refused before
    subject = opened(
        source, checkpoint=checkpoint, data=data, model=model, n=n, norm=norm, eps=eps, device=where,
        data_dir=data_dir, image_size=image_size, mean=mean, std=std, console=console,
    )  # fmt: skip
    path, card, images = subject.path, subject.card, subject.images
    chosen = [attacks.parse(text, threat=subject.threat) for text in _expand(attack_names)]
    folder = Path(out) if out else path.parent / "evaluations"
    require_folder(folder)
    given = {}
    if surrogate is not None:
        other = opened(
            surrogate, data=subject.dataset, n=n, norm=_norm_of(subject.threat), eps=subject.threat.eps, device=where,
            console=console,
        )  # fmt: skip
        label = f"{other.card.get('method', other.path.name)} {other.model} {other.card.get('run', '')}".strip()
        given = _transferred(other, label, chosen, batch_size, precision, seed, console)
        chosen = []
    here = environment()
    provenance = {
        **{key: card.get(key, default) for key, default in {**_ORIGIN, "checkpoint": path.name}.items()},
        "data": subject.dataset.name,
        "images": subject.dataset.digest,
        "model": subject.model,
        "threat": str(subject.threat),
        "n": len(images),
        "precision": precision,
        "attack_seed": seed,
        "batch_size": batch_size,
        **{key: here[key] for key in ("commit", "torch", "device")},
    }
    names = [*map(attacks.spelled, chosen), *given]
    measured = repr([*names, *provenance.items()])
    file = folder / f"{path.stem}-{hashlib.sha256(measured.encode()).hexdigest()[:8]}.json"
    weights = hashlib.sha256(path.read_bytes() + repr((measured, mean, std, save_examples)).encode()).hexdigest()[:16]
    state = folder / f".{file.stem}-{weights}.state"
    if state.exists():
        say(console, f"goes on where it was interrupted: {state}")
    with progress_bars(console, "images") as bars:
        tasks = {k: bars.add_task(k, total=len(images)) for k in ("clean", *names)}
        evaluation = evaluate(
            subject.net, images, chosen, given=given, batch_size=batch_size, precision=precision, seed=seed,
            keep_examples=save_examples, state=state,
            advance=lambda attack, done: bars.advance(tasks[attack], done),
        )  # fmt: skip
    records = _records(evaluation, provenance)
    write_json(file, _content(records, evaluation, subject.dataset.note))
    if save_examples:
        _save_examples(file.with_suffix(".npz"), evaluation, images)
    state.unlink(missing_ok=True)
    if (path.parent / "run.json").exists():
        append_records(path.parent / "records.jsonl", records)
    return Measurement(records, evaluation, file, "extra" in card)


def opened(
    source: str | Path,
    *,
    checkpoint: str = "best",
    data: str | Dataset | None = None,
    model: str | None = None,
    n: int | None = None,
    norm: str | None = None,
    eps: float | None = None,
    device: str | torch.device = "auto",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    console: Console,
) -> Subject:
    """Load a run's checkpoint, or a weights file, and what it is to be measured on; arguments as for `measure`.

    Raises:
        UserError: the parts do not fit together, or one is missing.
    """
    path = weights_of(source, checkpoint)
    state, card = load_weights(path)
    spelled = _needed(model, card, "model", path)
    budget = _budget(norm, eps, card)
    where = pick_device(device) if isinstance(device, str) else device
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
    if mean or std:
        channels = dataset.shape[0]
        fits = len(mean) == len(std) == channels
        require(fits, f"mean={tuple(mean)} and std={tuple(std)} must have one value for each of {channels} channels")
        net = models.Normalized(net, mean, std)
    models.check_output(net, dataset.shape, dataset.classes)
    many = len(dataset.test)
    require(n is None or 1 <= n <= many, f"n={n} must be in 1 to {many}, the test images of {dataset.name}")
    images = dataset.test if n is None else stratified_subset(dataset.test, n, SUBSET_SEED)
    if "run" in card and (path.parent / "run.json").exists() and not (run := Run.read(path.parent)).finished:
        card["epochs"], whole = len(run.log), card["epochs"]
        say(console, f"{path.parent} is not finished: it stands at epoch {card['epochs']} of {whole}")
    if dataset.note:
        say(console, f"{dataset.name}: {dataset.note}")
    return Subject(place(net, where).eval(), images.to(where), budget, dataset, spelled, card, path)


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


def _norm_of(budget: Threat) -> str:
    return next(norm for norm, kind in THREATS.items() if isinstance(budget, kind))


def _transferred(
    surrogate: Subject,
    label: str,
    chosen: Sequence[attacks.Attack],
    batch_size: int,
    precision: str,
    seed: int,
    console: Console,
) -> dict[str, Given]:
    """Return the surrogate's examples of each attack under the name that tells where they are from."""
    given = {}
    how = {"batch_size": batch_size, "precision": precision, "seed": seed}
    with progress_bars(console, "images") as bars:
        for attack in chosen:
            task = bars.add_task(f"{attacks.spelled(attack)} on {label}", total=len(surrogate.images))
            file = place_of(surrogate.path, attack, surrogate.images, **how)
            x_adv = crafted(
                surrogate.net, surrogate.images, attack, batch_size=batch_size, precision=precision, seed=seed,
                file=file, advance=lambda done, task=task: bars.advance(task, done),
            )  # fmt: skip
            name = f"transfer({attacks.spelled(attack)}, from {label})"
            given[name] = Given(x_adv, attack.threat if attack.bounded else None)
    return given


def _expand(names: Sequence[str]) -> list[str]:
    expanded = [name for given in names for name in (attacks.STANDARD if given == "standard" else (given,))]
    return list(dict.fromkeys(name for name in expanded if name not in ("clean", "none")))


def _records(evaluation: Evaluation, provenance: dict[str, Any]) -> list[Record]:
    attacked = [name for name in evaluation.correct if name != "clean" and name not in evaluation.unbounded]
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
        "passes": {name: counts._asdict() for name, counts in evaluation.passes.items()},
        "trails": evaluation.trails,
        "members": {
            name: {member: counts._asdict() for member, counts in costs.items()}
            for name, costs in evaluation.members.items()
        },
        "note": note,
        "environment": environment(),
    }


def _save_examples(file: Path, evaluation: Evaluation, images: Images) -> None:
    """Write clean and adversarial images (N, C, H, W) in [0, 1], labels, and what withstands, by attack."""
    arrays: dict[str, Any] = {"x": images.floats().cpu().numpy(), "y": images.labels.cpu().numpy()}
    for name, examples in evaluation.examples.items():
        arrays[f"x_adv {name}"] = examples.numpy()
        arrays[f"correct {name}"] = evaluation.correct[name].numpy()
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(file, content.getvalue())
