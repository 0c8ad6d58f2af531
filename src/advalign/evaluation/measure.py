"""Evaluation as a verb: load a run or a weights file, attack it, and write down what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from glob import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from advalign.attacks import Attack
from advalign.attacks.names import transfer_name
from advalign.attacks.quantized import quantize as quantized
from advalign.attacks.spelled import parse_attacks
from advalign.attacks.targets import check_class_order, check_target_class
from advalign.errors import require
from advalign.evaluation.accuracy import Evaluation, PrecomputedExamples, evaluate
from advalign.evaluation.by_class import ClassOutcomes
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.published import compare_published
from advalign.evaluation.results import (
    Measurement,
    make_records,
    mean_distances,
    nearest_radii,
    write_examples,
    write_measurement,
)
from advalign.evaluation.target import Target, load_target
from advalign.evaluation.transfer import transfer_examples, transferable
from advalign.evaluation.until import check_until, evaluate_until
from advalign.registration import register_attacks, source_digests
from advalign.runs import Run, Weights, find_weights
from advalign.runs.records import require_appendable
from advalign.runs.zoo import zoo_model
from advalign.runtime.device import autocast, pick_device
from advalign.runtime.environment import environment
from advalign.runtime.files import digest, present, require_writable
from advalign.runtime.progress import counting, say
from advalign.runtime.sealed import SEAL_FORMAT
from advalign.threats import Linf, check_radius, make_threat

# What a record takes from the weights' card. Weights without a training record have none: `run` is then empty, `method`
# is the file's name, and the others are unknown.
_TRAINING = {"training_images": 0, "epochs": 0, "recipe": "", "seed": 0, "run": ""}


def measure(
    source: str | Path | Weights,
    attack_names: Sequence[str] = ("standard",),
    target_options: TargetOptions | None = None,
    attack_options: AttackOptions | None = None,
    *,
    surrogate: str | Path | Weights | None = None,
    quantize: int | None = None,
    until: float | None = None,
    out: str | Path | None = None,
    save_examples: bool = False,
    console: Console | None = None,
) -> Measurement:
    """Measure a run's checkpoint, or a weights file, on the test set; an interrupted measurement is resumed.

    Args:
        source: a run folder, a weights file, or `MODEL@FILE`.
        attack_names: spellings, or `standard` for the usual ones; none measures clean accuracy only.
        surrogate: a run folder, weights file or `MODEL@FILE` of another network. The attacks are made on it, once, kept
            beside its weights, and shown to the source, whose threat model and images it takes. Only attacks whose
            examples carry over to other networks.
        quantize: bits, such as 8: the attacks become `quantized(ATTACK, bits=8)`.
        until: go on to more and more test images, until the 95 % interval of no accuracy is wider than so many points
            each way; instead of `n`.
        out: folder of the result; `evaluations` in the run folder, or beside the weights file, if None.
        save_examples: also write the adversarial images of each attack, beside the result as `.npz`.

    Raises:
        UserError: anything that cannot work, before the evaluation starts.
    """
    which = target_options or TargetOptions()
    (measured,) = measure_radii(
        source, [which.eps], attack_names, which, attack_options, surrogate=surrogate, quantize=quantize, until=until,
        out=out, save_examples=save_examples, console=console,
    )  # fmt: skip
    return measured


def measure_radii(
    source: str | Path | Weights,
    radii: Sequence[float | None],
    attack_names: Sequence[str] = ("standard",),
    target_options: TargetOptions | None = None,
    attack_options: AttackOptions | None = None,
    *,
    surrogate: str | Path | Weights | None = None,
    quantize: int | None = None,
    until: float | None = None,
    out: str | Path | None = None,
    save_examples: bool = False,
    console: Console | None = None,
) -> list[Measurement]:
    """Measure as `measure` does at each of several radii, with one pass over the clean images for all.

    Args:
        radii: each once, measured from the least to the largest; None, alone, is that of training. The radius of
            `target_options` does not count.

    Raises:
        UserError: anything that cannot work, before the evaluation starts.
    """
    which, how = target_options or TargetOptions(), attack_options or AttackOptions()
    console = console or Console(quiet=True)
    if len(radii) > 1:
        radii = sorted(eps for eps in radii if eps is not None)
    for eps in radii:
        require(list(radii).count(eps) == 1, lambda: f"eps={eps} is given twice: name each radius once")
    # Data may take a download, so what fails with any data is refused before they are loaded.
    autocast(pick_device(which.device), how.precision)
    attacks = _parsed(attack_names, quantize, transfers=surrogate is not None)
    require(len(radii) == 1 or bool(attacks), "several radii need an attack: name one")
    if until is not None:
        check_until(until)
        require(which.n is None, lambda: f"give n={which.n} or until={until:g}, which finds the number of images")
        require(surrogate is None, "until needs attacks on the network itself: leave out surrogate, or give n")
    weights = find_weights(source, which.checkpoint, model=which.model, trust_model=which.trust_model)
    folder = Path(out) if out else weights.path.parent / "evaluations"
    require_writable(folder)
    if (weights.path.parent / "run.json").exists():
        _ = Run.read(weights.path.parent).records  # damaged ones, or another run's, are refused before the attacks
        require_appendable(weights.path.parent / "records.jsonl")
    surrogate_weights = None if surrogate is None else find_weights(surrogate, trust_model=which.trust_model)
    if surrogate_weights is not None:
        require_writable(surrogate_weights.path.parent / "transfer")

    loaded = load_target(weights, replace(which, eps=radii[0]), console=console)
    threats = [loaded.threat, *(make_threat(loaded.threat.norm, eps) for eps in radii[1:] if eps is not None)]
    for threat in threats:
        check_radius(threat, loaded.dataset.shape)
    results: list[Measurement] = []
    for threat in threats:
        if len(threats) > 1:
            say(console, f"in {threat}:")
        clean = results[0].evaluation if results and until is None else None
        each = replace(loaded, threat=threat)
        results.append(_measure_in(
            each, attacks, which, how, surrogate_weights, clean=clean, until=until, folder=folder,
            save_examples=save_examples, console=console,
        ))  # fmt: skip
    return results


def _parsed(names: Sequence[str], bits: int | None, *, transfers: bool) -> list[Attack]:
    """Return the attacks of these spellings, in a threat model that is yet to be replaced."""
    attacks = parse_attacks(map(register_attacks, names), Linf())
    if bits is not None:
        attacks = [quantized(attack, bits) for attack in attacks]
    for attack in attacks if transfers else ():
        transferable(attack)
    return attacks


def _measure_in(
    target: Target,
    attacks: Sequence[Attack],
    which: TargetOptions,
    how: AttackOptions,
    surrogate_weights: Weights | None,
    *,
    clean: Evaluation | None,
    until: float | None,
    folder: Path,
    save_examples: bool,
    console: Console,
) -> Measurement:
    """Attack the target in its threat model, itself or on the surrogate, and write the result."""
    chosen, transferred = [attack.with_threat(target.threat) for attack in attacks], {}
    for attack in chosen:
        check_target_class(attack, len(target.classes.class_names))
    identity = {"weights": target.digest, "mean": list(which.mean), "std": list(which.std)}
    if target.classes.changes_labels:
        identity["classes"] = list(target.dataset.class_names)
    if target.part:
        identity["part"] = target.part
    if surrogate_weights is not None:
        other = _load_surrogate(surrogate_weights, target, which, console)
        check_class_order(chosen, other.classes.class_names, target.classes.class_names)
        identity |= {"surrogate": other.label, "surrogate_weights": other.digest}
        made = transfer_examples(other, chosen, how, console)
        transferred = {transfer_name(name, other.label): examples for name, examples in made.items()}
    if user_sources := source_digests(chosen):
        identity["own"] = user_sources
    if until is not None:
        identity["until"] = until
    return _measure_target(
        target, [] if transferred else chosen, transferred, how,
        identity=identity, clean=clean, folder=folder, save_examples=save_examples, console=console,
    )  # fmt: skip


def _measure_target(
    target: Target,
    chosen: Sequence[Attack],
    transferred: Mapping[str, PrecomputedExamples],
    how: AttackOptions,
    *,
    identity: Mapping[str, Any],
    clean: Evaluation | None,
    folder: Path,
    save_examples: bool,
    console: Console,
) -> Measurement:
    """Attack the target and write the result, in a file that is named by all that the result depends on."""
    setting = _setting(target, how)
    made_with = {key: environment()[key] for key in ("commit", "torch", "device")}
    names = [*map(str, chosen), *transferred]
    keep = save_examples or not all(attack.bounded for attack in chosen)  # distances are taken from the examples
    file = folder / f"{target.path.stem}-{_digest([*names, *setting.items(), *identity.items()])}.json"
    version = environment()["advalign"], SEAL_FORMAT  # of what may resume it: of a wheel, no commit is known
    state = folder / f".{file.stem}-{_digest([*made_with.items(), *version, keep])}.state"
    if present(state):
        say(console, f"resuming an interrupted evaluation: {state}")
    if "until" in identity:
        evaluation, target = evaluate_until(
            target, chosen, identity["until"], how, keep_examples=keep, state=state, console=console
        )
    else:
        with counting(console, ["clean", *names], len(target.images)) as advance:
            evaluation = evaluate(
                target.net, target.images, chosen, precomputed=transferred, batch_size=how.batch_size,
                precision=how.precision, seed=how.seed, keep_examples=keep, clean=clean, state=state, advance=advance,
            )  # fmt: skip
    _, doubt = compare_published(target.card, target.dataset.name, evaluation.correct["clean"])
    if doubt:
        evaluation = replace(evaluation, warnings=(doubt, *evaluation.warnings))
    examples = {**evaluation.examples, **{name: each.x_adv for name, each in transferred.items()}}
    measured = _measurement(target, evaluation, examples, how, file)
    write_measurement(measured, target, identity)
    if save_examples:
        write_examples(measured, examples, target, how.batch_size)
    for each in folder.glob(f".{escape(file.stem)}-*.state"):  # other versions left theirs, which nothing resumes
        each.unlink(missing_ok=True)  # last: until everything is written, a stop must not lose what was measured
    return measured


def write_outcomes(
    target: Target, evaluation: Evaluation, how: AttackOptions, *, identity: Mapping[str, Any], folder: Path
) -> Measurement:
    """Write down an evaluation of a target that was made elsewhere, by bounded attacks, as `measure` does its own.

    Args:
        identity: what the result depends on beside the weights, and what its records say.

    Raises:
        UserError: a file cannot be written.
    """
    identity = {"weights": target.digest, **identity}
    setting = _setting(target, how)
    file = folder / f"{target.path.stem}-{_digest([*evaluation.correct, *setting.items(), *identity.items()])}.json"
    measured = _measurement(target, evaluation, {}, how, file)
    write_measurement(measured, target, identity)
    return measured


def _measurement(
    target: Target, evaluation: Evaluation, examples: Mapping[str, Tensor], how: AttackOptions, file: Path
) -> Measurement:
    made_with = {key: environment()[key] for key in ("commit", "torch", "device")}
    agreement, _ = compare_published(target.card, target.dataset.name, evaluation.correct["clean"])
    return Measurement(
        records=make_records(evaluation, {**_setting(target, how), **made_with}),
        evaluation=evaluation,
        path=file,
        extra_data="extra" in target.card,
        distances=mean_distances(evaluation, examples, target.images),
        radii=nearest_radii(evaluation, examples, target.images, target.threat),
        note="; ".join(filter(None, (target.note, agreement))),
        published=zoo_model(target.card["zoo"]) if "zoo" in target.card else None,
        by_class=ClassOutcomes.count(target.classes.class_names, target.images.labels, evaluation.outcomes),
    )


def _load_surrogate(weights: Weights, target: Target, which: TargetOptions, console: Console) -> Target:
    """Load the surrogate on the target's images and in its threat model."""
    options = TargetOptions(
        data=target.dataset, n=which.n, norm=target.threat.norm, eps=target.threat.eps, device=which.device
    )
    return load_target(weights, options, keep_seen=True, console=console)


def _setting(target: Target, how: AttackOptions) -> dict[str, Any]:
    """Return what every record of a measurement says of the network, the images and the attacks."""
    defaults = {**_TRAINING, "checkpoint": target.path.name}
    return {
        "method": target.method,
        **{key: target.card.get(key, default) for key, default in defaults.items()},
        "data": target.dataset.name,
        "images": target.dataset.digest,
        "model": target.model,
        "threat": str(target.threat),
        "n": len(target.images),
        "precision": how.precision,
        "attack_seed": how.seed,
        "batch_size": how.batch_size,
    }


def _digest(parts: Sequence[object]) -> str:
    return digest(repr(parts), digits=8)
