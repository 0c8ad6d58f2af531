"""A measurement on disk: records, the outcome of every image as JSON, and the adversarial images."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advalign.attacks.classification import in_fp32
from advalign.attacks.names import worst_case_name
from advalign.attacks.spelled import looks_for_the_nearest
from advalign.data import Images
from advalign.evaluation.accuracy import WORST_CASE, Evaluation
from advalign.evaluation.by_class import ClassOutcomes
from advalign.evaluation.target import Target
from advalign.models.adapted import adapted
from advalign.runs import Record, append_records
from advalign.runs.formats import write_checked_json
from advalign.runs.zoo import ZooModel
from advalign.runtime.environment import environment
from advalign.runtime.files import write_atomically
from advalign.runtime.sealed import Owner, seal_zip
from advalign.threats import Threat


@dataclass(frozen=True, eq=False)
class Measurement:
    """An evaluation with its records, and the file that holds both."""

    records: list[Record]
    evaluation: Evaluation
    path: Path
    extra_data: bool
    """Whether the network was trained on more than its data set."""
    distances: dict[str, float]
    """Of each attack that is not bounded by the threat model: the mean L2 distance of the images that fool the network.
    """

    radii: dict[str, list[float]]
    """Of each attack that looks for the nearest adversary: its distance from each image, in the threat's norm; 0 of an
    image that is misclassified anyway, inf where none was found."""
    note: str
    """What a reader of the numbers must know of the images and their classes; often nothing."""
    by_class: ClassOutcomes
    published: ZooModel | None = None
    """The published model that was measured, if it was named as one."""

    @property
    def has_training_record(self) -> bool:
        """Whether it is known how the network was trained."""
        return bool(self.records[0].run)

    @property
    def examples_path(self) -> Path:
        """The file of the adversarial images, which is written on request."""
        return self.path.with_suffix(".npz")


def make_records(evaluation: Evaluation, provenance: Mapping[str, Any]) -> list[Record]:
    """Return a record for each accuracy: clean, under each attack, and in the worst case over the bounded attacks."""
    attacked = [name for name in evaluation.correct if name != "clean" and name not in evaluation.unbounded]
    names = {WORST_CASE: worst_case_name(attacked)}
    seconds = {**evaluation.seconds, WORST_CASE: sum(evaluation.seconds.values())}
    return [
        Record(**provenance, attack=names.get(name, name), accuracy=accuracy, seconds=round(seconds[name], 2))
        for name, accuracy in evaluation.accuracies().items()
    ]


def write_measurement(measured: Measurement, target: Target, identity: Mapping[str, Any]) -> None:
    """Write the JSON of a measurement, and add its records to those of the run, if the network is that of a run.

    Args:
        identity: what the result depends on beside what its records say; written as it is.

    Raises:
        UserError: a file cannot be written.
    """
    evaluation = measured.evaluation
    write_checked_json(
        measured.path,
        {
            "records": [asdict(record) for record in measured.records],
            "outcomes": outcome_digits(evaluation),
            "passes": {name: counts._asdict() for name, counts in evaluation.passes.items()},
            "trails": evaluation.trails,
            "members": {
                name: {member: counts._asdict() for member, counts in costs.items()}
                for name, costs in evaluation.members.items()
            },
            "warnings": evaluation.warnings,
            "note": measured.note,
            "class_names": list(target.classes.class_names),
            "class_sizes": measured.by_class.sizes,
            "class_correct": measured.by_class.correct,
            "preprocessing": dict(target.dataset.preprocessing),
            "environment": environment(),
            **identity,
            "distances": measured.distances,
            **({"success": evaluation.success} if evaluation.success else {}),
            **({"radii": _without_inf(measured.radii)} if measured.radii else {}),
        },
    )
    folder = target.path.parent
    if (folder / "run.json").exists():
        append_records(folder / "records.jsonl", measured.records)


def outcome_digits(evaluation: Evaluation) -> dict[str, str]:
    """Return each outcome as a digit for each image, 1 if it is classified correctly."""
    return {name: "".join(map(str, flags.int().tolist())) for name, flags in evaluation.correct.items()}


def mean_distances(evaluation: Evaluation, examples: Mapping[str, Tensor], images: Images) -> dict[str, float]:
    """Return the mean L2 distance of the images that fool the network, for each attack without a bound."""
    distances = {}
    for name in evaluation.correct:
        fooled = evaluation.correct["clean"] & ~evaluation.correct[name]
        if name in evaluation.unbounded and fooled.any():
            x = images.to("cpu").floats()
            distances[name] = float((examples[name].cpu() - x)[fooled].flatten(1).norm(dim=1).mean())
    return distances


def nearest_radii(
    evaluation: Evaluation, examples: Mapping[str, Tensor], images: Images, threat: Threat
) -> dict[str, list[float]]:
    """Return, for each attack that looks for the nearest adversary, its distance from each image, as `radii` has it."""
    radii, clean = {}, evaluation.correct["clean"]
    for name, withstands in evaluation.correct.items():
        if name in examples and looks_for_the_nearest(name, threat.norm):
            x = images.to("cpu").floats()  # here, since all images as floats may be more than fits
            moved = threat.distance(examples[name].cpu().double(), x.double())
            distances = torch.where(withstands, torch.inf, torch.where(clean, moved, 0.0))
            radii[name] = [float(f"{each:.6g}") for each in distances.tolist()]
    return radii


def _without_inf(radii: Mapping[str, list[float]]) -> dict[str, list[float | None]]:
    return {name: [None if each == float("inf") else each for each in of_name] for name, of_name in radii.items()}


def write_examples(measured: Measurement, examples: Mapping[str, Tensor], target: Target, batch_size: int) -> None:
    """Write the class names, the images (N, C, H, W) in [0, 1], their labels, and the network's predictions as `.npz`.

    Of each attack: its images, which of them withstand it, and what they are classified as.

    Raises:
        UserError: the file cannot be written.
    """
    x, device = target.images.to("cpu").floats(), target.images.labels.device
    arrays: dict[str, Any] = {
        "class_names": np.array(target.classes.class_names),
        "x": x.numpy(),
        "y": target.images.labels.cpu().numpy(),
        "predicted": _predicted(target.net, x, device, batch_size),
    }
    for name, x_adv in examples.items():
        arrays[f"x_adv {name}"] = x_adv.numpy()
        arrays[f"correct {name}"] = measured.evaluation.correct[name].numpy()
        arrays[f"predicted {name}"] = _predicted(target.net, x_adv, device, batch_size)
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    owner = Owner(measured.path.name, "remove it, and evaluate again")
    write_atomically(measured.examples_path, seal_zip(content.getvalue(), owner))


def _predicted(net: nn.Module, x: Tensor, device: torch.device, batch_size: int) -> NDArray[np.int64]:
    """Return the class (N,) that the network assigns to each image, in fp32 as everywhere outside of the attacks."""
    with torch.no_grad(), in_fp32(device):
        return torch.cat([adapted(net)(part.to(device)).argmax(1).cpu() for part in x.split(batch_size)]).numpy()
