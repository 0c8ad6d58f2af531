"""Diagnosis as a verb: load a run or a weights file, diagnose it, and write the verdicts as JSON."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from advalign.evaluation.diagnose import Diagnosis, N, diagnose
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.target import Target, load_target
from advalign.runs import Weights, find_weights
from advalign.runs.formats import write_checked_json
from advalign.runtime.environment import environment
from advalign.runtime.files import digest, require_writable


@dataclass(frozen=True, eq=False)
class WrittenDiagnosis:
    """A diagnosis with the network that it is of, and the JSON file that holds it."""

    diagnosis: Diagnosis
    target: Target
    path: Path


def diagnose_source(
    source: str | Path | Weights,
    target_options: TargetOptions | None = None,
    attack_options: AttackOptions | None = None,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
) -> WrittenDiagnosis:
    """Diagnose a run's checkpoint, or a weights file, and write the verdicts.

    Args:
        source: a run folder, a weights file, or `MODEL@FILE`.
        target_options: `n` is 500 if None; if there are fewer test images, all are used.
        attack_options: the precision is not used: a diagnosis is made in fp32.
        out: folder of the result; `diagnosis` in the run folder, or beside the weights file, if None.

    Raises:
        UserError: anything that cannot work, before the diagnosis starts.
    """
    which, how = target_options or TargetOptions(), attack_options or AttackOptions()
    console = console or Console(quiet=True)
    weights = find_weights(source, which.checkpoint, model=which.model, trust_model=which.trust_model)
    folder = Path(out) if out else weights.path.parent / "diagnosis"
    require_writable(folder)
    target = load_target(weights, replace(which, n=None), console=console)  # `diagnose` draws the images
    with console.status("") as status:
        diagnosis = diagnose(
            target.net, target.images, target.threat, n=which.n or N, batch_size=how.batch_size, seed=how.seed,
            advance=lambda step: status.update(f"diagnosing: {step}"),
        )  # fmt: skip
    source = f"{target.path}#{target.part}" if target.part else str(target.path)
    setting = {
        "source": source, "model": target.model, "data": target.dataset.name,
        "images": target.dataset.digest, "seed": how.seed, "batch_size": how.batch_size,
    }  # fmt: skip
    about = {"note": target.note, "class_names": list(target.classes.class_names)}
    identity = repr([*setting.values(), diagnosis.n, diagnosis.threat])
    file = folder / f"{target.path.stem}-{digest(identity, digits=8)}.json"
    write_checked_json(
        file, {**setting, **diagnosis.content(), "environment": environment(), **about}, target.card.get("run", "")
    )
    return WrittenDiagnosis(diagnosis, target, file)
