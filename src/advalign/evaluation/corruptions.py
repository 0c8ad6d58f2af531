"""Accuracy under common corruptions: every type at every severity, and their unweighted mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from advalign.attacks.classification import classified, in_fp32
from advalign.data.corruptions import SEVERITIES, Corruptions, find_corruptions
from advalign.data.images import stratified_split, to_unit
from advalign.errors import require
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.state import StateFile, state_owner
from advalign.evaluation.target import SUBSET_SEED, Target, load_target
from advalign.models.adapted import adapted
from advalign.models.modes import evaluating
from advalign.runs import Weights, find_weights
from advalign.runs.checkpoint import load_state
from advalign.runs.formats import write_checked_json
from advalign.runtime.environment import environment
from advalign.runtime.files import digest, present, require_writable
from advalign.runtime.progress import counting

CLEAN = "clean"


@dataclass(frozen=True, eq=False)
class CorruptionResult:
    """What a network classifies correctly of corrupted images."""

    name: str
    """Of the corruptions: `cifar10-c`, `cifar100-c` or `c-like`."""
    target: Target
    correct: Mapping[str, Tensor]
    """`clean`, and `TYPE SEVERITY`, to a boolean tensor (N,)."""
    missing: tuple[str, ...]
    """Types of the benchmark that were not there."""
    path: Path

    @property
    def types(self) -> tuple[str, ...]:
        """The types that were measured."""
        return tuple(dict.fromkeys(cell.partition(" ")[0] for cell in self.correct if cell != CLEAN))

    def accuracy(self, kind: str, severity: int) -> float:
        """Return the share of correct images in a cell, in [0, 1]."""
        return float(self.correct[f"{kind} {severity}"].double().mean())

    @property
    def mean(self) -> float:
        """The unweighted mean over types and severities: the accuracy that papers report as CIFAR-10-C."""
        cells = [self.accuracy(kind, severity) for kind in self.types for severity in SEVERITIES]
        return sum(cells) / len(cells)


def measure_corruptions(
    source: str | Path | Weights,
    corruptions: str,
    target_options: TargetOptions | None = None,
    attack_options: AttackOptions | None = None,
    *,
    out: str | Path | None = None,
    console: Console | None = None,
) -> CorruptionResult:
    """Measure a run's checkpoint, or a weights file, on corrupted test images, and write the outcomes as JSON.

    An interrupted measurement is resumed.

    Args:
        source: a run folder, a weights file, or `MODEL@FILE`.
        corruptions: `cifar10-c:DIR` or `cifar100-c:DIR`, the unpacked published files; or `c-like`, made here.
        attack_options: of them the batch size counts.
        out: folder of the result; `corruptions` in the run folder, or beside the weights file, if None.

    Raises:
        UserError: anything that cannot work, before the first image.
    """
    which, how = target_options or TargetOptions(), attack_options or AttackOptions()
    console = console or Console(quiet=True)
    weights = find_weights(source, which.checkpoint, model=which.model, trust_model=which.trust_model)
    folder = Path(out) if out else weights.path.parent / "corruptions"
    require_writable(folder)
    target = load_target(weights, replace(which, n=None), console=console)
    test, total = target.dataset.test, len(target.images)
    found = find_corruptions(corruptions, target.dataset)
    require(which.n is None or which.n <= total, lambda: f"n={which.n} must be in 1 to {total}")
    rows = torch.arange(total) if which.n is None else stratified_split(test.labels, which.n, SUBSET_SEED)[1]
    setting = {
        "corruptions": found.name, "missing": list(found.missing), "weights": target.digest, "part": target.part,
        "mean": list(which.mean), "std": list(which.std), "method": target.method, "model": target.model,
        "run": target.card.get("run", ""), "checkpoint": target.card.get("checkpoint", target.path.name),
        "data": target.dataset.name, "images": target.dataset.digest, "n": len(rows),
        **({"files": dict(found.files)} if found.files else {}),
    }  # fmt: skip
    file = folder / f"{target.path.stem}-{digest(repr([*setting.items()]), digits=8)}.json"
    versions = [environment()[key] for key in ("commit", "torch", "device", "advalign")]
    state = folder / f".{file.stem}-{digest(repr([*versions, *found.libraries.items()]), digits=8)}.state"
    correct = _classified(target, found, rows, how.batch_size, state, console)
    result = CorruptionResult(found.name, target, correct, found.missing, file)
    outcomes = {cell: "".join(map(str, flags.int().tolist())) for cell, flags in correct.items()}
    accuracies = {cell: float(flags.double().mean()) for cell, flags in correct.items()}
    write_checked_json(
        file,
        {**setting, "folder": found.folder, "libraries": dict(found.libraries), "accuracies": accuracies,
         "mean_accuracy": result.mean, "outcomes": outcomes, "note": target.note, "environment": environment()},
        setting["run"],
    )  # fmt: skip
    for each in folder.glob(f".{escape(file.stem)}-*.state"):
        each.unlink(missing_ok=True)
    return result


def _classified(
    target: Target, found: Corruptions, rows: Tensor, batch_size: int, state: Path, console: Console
) -> dict[str, Tensor]:
    """Return the outcomes of the clean images and of every cell, of which those in the state file are done."""
    done = load_state(state, ("correct",), state_owner(state))["correct"] if present(state) else {}
    network, cells, saved = adapted(target.net), list(found.cells()), StateFile(state)
    labels = target.images.labels
    with evaluating(network.net), counting(console, [found.name], len(rows) * (len(cells) + 1)) as advance:
        for name, cell in ((CLEAN, None), *((f"{kind} {severity}", (kind, severity)) for kind, severity in cells)):
            if name not in done:
                parts = []
                for part in rows.split(batch_size):
                    pixels = target.images.read(part.to(labels.device)) if cell is None else found.images(*cell, part)
                    x = pixels.to(labels.device)
                    with torch.no_grad(), in_fp32(labels.device):
                        logits = network(x if x.is_floating_point() else to_unit(x))
                    parts.append(classified(logits, labels[part.to(labels.device)]).cpu())
                done[name] = torch.cat(parts)
                saved.save({"correct": done})
            advance(found.name, len(rows))
    return done
