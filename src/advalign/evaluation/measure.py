"""Evaluation as a verb: take a run or a weights file, measure it on a test set, and write down records."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from advalign import attacks, models
from advalign.attacks.classification import in_fp32
from advalign.attacks.names import transfer_name, worst_case_name
from advalign.data import Dataset, Images, load, stratified_subset
from advalign.errors import UserError, require, unknown
from advalign.evaluation.accuracy import WORST_CASE, Evaluation, PrecomputedExamples, evaluate
from advalign.evaluation.transfer import craft_examples, examples_path, state_path, transferable
from advalign.registration import register_attacks
from advalign.runs import Record, Run, Weights, append_records, find_weights, require_classes
from advalign.runs.checkpoint import load_into, load_weights
from advalign.runtime.device import autocast, pick_device, to_device
from advalign.runtime.environment import environment
from advalign.runtime.files import digest, digest_of_file, require_writable, write_atomically, write_json
from advalign.runtime.progress import counting, say
from advalign.threats import Linf, Threat, make_threat

# What a record takes over from the weights' card. Where `run` is empty the weights are from elsewhere: `method` is then
# the file's name, and the others are not known.
_ORIGIN = {"training_images": 0, "epochs": 0, "recipe": "", "seed": 0, "run": ""}
SUBSET_SEED = 0  # one subset of the test set for all models, or their accuracies could not be compared


@dataclass(frozen=True, eq=False)
class Measurement:
    """An evaluation with its records, and the file that holds both."""

    records: list[Record]
    evaluation: Evaluation
    path: Path
    extra_data: bool
    distances: dict[str, float]
    """Of each attack that no threat model confines: the mean L2 distance of the images that fool the model."""

    @property
    def trained_here(self) -> bool:
        """Whether it is known what the model was trained on."""
        return bool(self.records[0].run)


@dataclass(frozen=True, eq=False)
class Target:
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
    digest: str
    """Of the weights file."""

    @property
    def label(self) -> str:
        """Method, architecture, and the run, how far it is if unfinished, or the digest of a file from elsewhere."""
        return f"{self.method} {self.model} {self.card.get('run', self.digest[:10])}{self.card.get('stands', '')}"

    @property
    def method(self) -> str:
        """What the model was trained with, or the file's name."""
        return self.card.get("method", self.path.name)


def measure(
    source: str | Path | Weights,
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
    surrogate: str | Path | Weights | None = None,
    trust_model: bool = False,
    out: str | Path | None = None,
    save_examples: bool = False,
    console: Console | None = None,
) -> Measurement:
    """Measure a run's checkpoint, or a weights file, on the test set; one that was interrupted goes on.

    Args:
        source: a run folder, a weights file, or `MODEL@FILE`; a file from elsewhere also needs its model and `data`.
        attack_names: spellings, or `standard` for the usual ones; none measures clean accuracy only.
        data, norm, eps: what the model was trained with, if not given; Linf(8/255) for naturally trained models.
        image_size: side of the images of `folder:PATH`; what the model was trained on if not given.
        n: on this many test images, stratified, the same for every model; all if not given.
        mean, std: of each channel, for weights from elsewhere whose network reads normalised images; of the source,
            not of the surrogate.
        surrogate: a run folder, weights file or `MODEL@FILE` of another model: the attacks are made on it, once, kept
            beside its weights, and shown to the source. Its threat, data and images are the source's. Only attacks
            that can go on once the surrogate is fooled: `transfer.TRANSFERABLE`.
        trust_model: whether functions may be called that the files of source and surrogate name as their architecture.
        out: folder of the result; `evaluations` in the run folder, or beside the weights file, if not given.
        save_examples: also write the adversarial images of each attack, beside the result as `.npz`.

    Raises:
        UserError: anything that cannot work, before the evaluation starts.
    """
    console = console or Console(quiet=True)
    require(batch_size >= 1, lambda: f"batch_size={batch_size} must be at least 1")
    where = pick_device(device)
    autocast(where, precision)
    for attack in parse_attacks(
        attack_names, Linf()
    ):  # data may take a download: what fails in any threat is refused before
        if surrogate is not None:
            transferable(attack)
    weights = find_weights(source, checkpoint, model=model, trust_model=trust_model)
    folder = Path(out) if out else weights.path.parent / "evaluations"
    require_writable(folder)
    black_box = None if surrogate is None else find_weights(surrogate, trust_model=trust_model)
    if black_box is not None:
        require_writable(black_box.path.parent / "transfer")
    subject = load_target(
        weights, data=data, n=n, norm=norm, eps=eps, device=where,
        data_dir=data_dir, image_size=image_size, mean=mean, std=std, console=console,
    )  # fmt: skip
    path, card, images = subject.path, subject.card, subject.images
    chosen = parse_attacks(attack_names, subject.threat)
    given: dict[str, PrecomputedExamples] = {}
    identity: dict[str, Any] = {"weights": subject.digest, "mean": list(mean), "std": list(std)}
    if black_box is not None:
        other = load_target(
            black_box, data=subject.dataset, n=n, norm=subject.threat.norm, eps=subject.threat.eps, device=where,
            console=console,
        )  # fmt: skip
        identity |= {"surrogate": other.label, "surrogate_weights": other.digest}
        how = {"batch_size": batch_size, "precision": precision, "seed": seed}
        made = transfer_examples(other, chosen, console, **how)
        given = {transfer_name(name, other.label): examples for name, examples in made.items()}
        chosen = []
    setting = {
        "method": subject.method,
        **{key: card.get(key, default) for key, default in {**_ORIGIN, "checkpoint": path.name}.items()},
        "data": subject.dataset.name,
        "images": subject.dataset.digest,
        "model": subject.model,
        "threat": str(subject.threat),
        "n": len(images),
        "precision": precision,
        "attack_seed": seed,
        "batch_size": batch_size,
    }
    made_with = {key: environment()[key] for key in ("commit", "torch", "device")}
    names = [*map(str, chosen), *given]
    measured = [*names, *setting.items(), *identity.items()]
    keep = save_examples or not all(attack.bounded for attack in chosen)  # distances are taken from the examples
    file = folder / f"{path.stem}-{_digest(measured)}.json"
    state = folder / f".{file.stem}-{_digest([*made_with.items(), keep])}.state"
    if state.exists():
        say(console, f"goes on where it was interrupted: {state}")
    with counting(console, ["clean", *names], len(images)) as advance:
        evaluation = evaluate(
            subject.net, images, chosen, given=given, batch_size=batch_size, precision=precision, seed=seed,
            keep_examples=keep, state=state, advance=advance,
        )  # fmt: skip
    examples = {**evaluation.examples, **{name: each.x_adv for name, each in given.items()}}
    distances = _distances(evaluation, examples, images)
    records = _records(evaluation, {**setting, **made_with})
    write_json(file, {**_content(records, evaluation, subject.dataset.note), **identity, "distances": distances})
    if save_examples:
        _save_examples(file.with_suffix(".npz"), evaluation, examples, subject, batch_size)
    if (path.parent / "run.json").exists():
        append_records(path.parent / "records.jsonl", records)
    state.unlink(missing_ok=True)  # last, or a stop in between would lose them
    return Measurement(records, evaluation, file, "extra" in card, distances)


def load_target(
    weights: Weights,
    *,
    data: str | Dataset | None = None,
    n: int | None = None,
    norm: str | None = None,
    eps: float | None = None,
    device: str | torch.device = "auto",
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    console: Console,
) -> Target:
    """Load weights, and what they are to be measured on; the other arguments are those of `measure`.

    Raises:
        UserError: the parts do not fit together, or one is missing.
    """
    require(n is None or n >= 1, lambda: f"n={n} must be at least 1")
    require(
        bool(mean) == bool(std), lambda: f"--{'std' if mean else 'mean'} is missing: give --mean and --std, or neither"
    )
    require(
        len(mean) == len(std),
        lambda: f"mean={tuple(mean)} and std={tuple(std)} must have one value for each channel each",
    )
    path = weights.path
    state, card = load_weights(path)
    spelled = weights.architecture(card)
    if spelled is None:
        raise UserError(f"{path} does not say its model: write MODEL@{path}, as in resnet18@{path}, or --model MODEL")
    spelled = models.canonical(spelled)
    require(
        not (mean and card),
        lambda: f"{path} was trained on images in [0, 1]: mean and std are for weights from elsewhere",
    )
    threat = _threat(norm, eps, card)
    where = pick_device(device) if isinstance(device, str) else device
    shape = tuple(card.get("shape", ()))
    if not isinstance(data, Dataset):
        size = image_size or (shape[1] if shape else 32)
        if (data := data or card.get("data")) is None:
            raise UserError(f"{path} does not say its data: name them with --data")
        data = load(str(data), directory=data_dir, image_size=size)
    dataset = data
    require(
        not shape or shape == dataset.shape,
        lambda: f"images of {dataset.name} have shape {dataset.shape}, but {path} was trained on {shape}",
    )
    require_classes(path, card, dataset.classes, dataset.name)
    net = models.build(spelled, classes=dataset.classes, channels=dataset.shape[0])
    load_into(net, state, str(path))
    if mean:
        channels = dataset.shape[0]
        require(
            len(mean) == channels, lambda: f"mean={tuple(mean)} must have one value for each of {channels} channels"
        )
        net = models.Normalized(net, mean, std)
    models.check_output(net, dataset.shape, dataset.classes)
    many = len(dataset.test)
    require(n is None or 1 <= n <= many, lambda: f"n={n} must be in 1 to {many}, the test images of {dataset.name}")
    images = dataset.test if n is None else stratified_subset(dataset.test, n, SUBSET_SEED)
    if "run" in card and (path.parent / "run.json").exists() and not (run := Run.read(path.parent)).finished:
        card["epochs"], whole = len(run.log), card["epochs"]
        card["stands"] = f" at epoch {card['epochs']}"
        say(console, f"{path.parent} is not finished: it stands at epoch {card['epochs']} of {whole}")
    if dataset.note:
        say(console, f"{dataset.name}: {dataset.note}")
    return Target(
        to_device(net, where).eval(), images.to(where), threat, dataset, spelled, card, path, digest_of_file(path)
    )


def _threat(norm: str | None, eps: float | None, card: dict[str, Any]) -> Threat:
    """Return the threat that is asked for; a radius without its norm is taken from the card, never another norm's."""
    trained = card.get("norm", "linf")
    if eps is None and norm not in (None, trained):
        raise UserError(f"--norm {norm} needs its radius, --eps: the model was trained in {trained}")
    return make_threat(norm or trained, card.get("eps", 8 / 255) if eps is None else eps)


def transfer_examples(
    surrogate: Target,
    chosen: Sequence[attacks.Attack],
    console: Console,
    *,
    batch_size: int,
    precision: str,
    seed: int,
) -> dict[str, PrecomputedExamples]:
    """Return the surrogate's examples of each attack by its spelling, made now or before.

    Raises:
        UserError: as `craft_examples`.
    """
    given = {}
    how = {"batch_size": batch_size, "precision": precision, "seed": seed}
    tasks = {str(attack): f"{attack!s} on {surrogate.label}" for attack in chosen}
    with counting(console, list(tasks.values()), len(surrogate.images)) as advance:
        for attack in chosen:
            spelled = str(attack)
            file = examples_path(surrogate.path, surrogate.model, attack, surrogate.images, **how)
            if state_path(file).exists():
                say(console, f"goes on where it was interrupted: {state_path(file)}")
            x_adv = craft_examples(
                surrogate.net, surrogate.images, attack, batch_size=batch_size, precision=precision, seed=seed,
                file=file, advance=lambda done, task=tasks[spelled]: advance(task, done),
            )  # fmt: skip
            given[spelled] = PrecomputedExamples(x_adv, attack.threat if attack.bounded else None)
    return given


def parse_attacks(names: Sequence[str], threat: Threat) -> list[attacks.Attack]:
    """Return the attacks that are spelled, each once; `standard` stands for several, `none` for none.

    The user's own may be spelled by their file, `my_file:MyAttack(steps=5)`.

    Raises:
        UserError: unknown attack or argument, or a value out of range.
    """
    texts = [each for name in names for each in (attacks.STANDARD if name == "standard" else (name,))]
    found = {}
    for text in map(register_attacks, texts):
        head, bracket, _ = text.partition("(")
        head = head.strip().replace("_", "-")
        if head in ("clean", "none") and not bracket:
            continue
        known = [*attacks.ATTACKS, "worst"]
        if head not in known:
            raise unknown("attack", head, [*known, "standard", "none"])
        require(head != "worst" or bool(bracket), "worst needs attacks, as in 'worst(apgd-ce, square)'")
        attack = attacks.parse(text, threat=threat)
        found.setdefault(str(attack), attack)
    return list(found.values())


def _records(evaluation: Evaluation, provenance: dict[str, Any]) -> list[Record]:
    attacked = [name for name in evaluation.correct if name != "clean" and name not in evaluation.unbounded]
    names = {WORST_CASE: worst_case_name(attacked)}
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
        "warnings": evaluation.warnings,
        "note": note,
        "environment": environment(),
    }


def _distances(evaluation: Evaluation, examples: dict[str, torch.Tensor], images: Images) -> dict[str, float]:
    """Return the mean L2 distance of the images that fool, under each attack that may leave the threat model."""
    distances, x = {}, images.floats().cpu()
    for name in evaluation.correct:
        fooled = evaluation.correct["clean"] & ~evaluation.correct[name]
        if name in evaluation.unbounded and fooled.any():
            distances[name] = float((examples[name].cpu() - x)[fooled].flatten(1).norm(dim=1).mean())
    return distances


def _digest(parts: Sequence[object]) -> str:
    return digest(repr(parts), digits=8)


def _save_examples(
    file: Path, evaluation: Evaluation, examples: dict[str, torch.Tensor], subject: Target, batch_size: int
) -> None:
    """Write the names of the classes, images (N, C, H, W) in [0, 1], labels, and what the model takes each image for.

    Of each attack: its images, which of them withstand, and what the model takes them for.
    """
    x = subject.images.floats()
    arrays: dict[str, Any] = {
        "class_names": np.array(subject.dataset.class_names),
        "x": x.cpu().numpy(),
        "y": subject.images.labels.cpu().numpy(),
        "predicted": _predicted(subject.net, x, x.device, batch_size),
    }
    for name, x_adv in examples.items():
        arrays[f"x_adv {name}"] = x_adv.numpy()
        arrays[f"correct {name}"] = evaluation.correct[name].numpy()
        arrays[f"predicted {name}"] = _predicted(subject.net, x_adv, x.device, batch_size)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    write_atomically(file, content.getvalue())


def _predicted(net: nn.Module, x: torch.Tensor, device: torch.device, batch_size: int) -> NDArray[np.int64]:
    """Return the class (N,) that the network takes each image for, in fp32 as in the verdict."""
    with torch.no_grad(), in_fp32(device):
        return torch.cat([net(part.to(device)).argmax(1).cpu() for part in x.split(batch_size)]).numpy()
