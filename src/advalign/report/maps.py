"""The features of a report's runs as figures: which runs are mapped, on which images, and what is said if none is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from advalign.errors import UserError
from advalign.report.classes import dataset_of
from advalign.report.features import explained, feature_map, feature_maps, few
from advalign.report.page import FigureSection
from advalign.report.sources import Found
from advalign.runs import find_weights
from advalign.runs.run import setting_digest
from advalign.runtime.device import pick_device
from advalign.runtime.files import digest_of_file
from advalign.runtime.progress import say
from advalign.threats import parse_threat

_CLASSES, _EACH = 5, 50  # few, since each image is attacked with 20 steps on each model

Where = tuple[str, str, str]
"""Data, their digest, and the threat."""


def feature_plates(
    found: Found,
    kept: Path,
    *,
    most: int,
    data_dir: str | Path | None,
    trust_model: bool,
    absent: Callable[[str], None],
    console: Console,
) -> list[FigureSection]:
    """Return maps of clean and adversarial features, a figure for each data set.

    Args:
        kept: folder of the maps, which are made anew only where weights, images or threat have changed.
        most: models in a figure.
        trust_model: whether functions may be called that weights files name as their architecture.
        absent: told what is not shown, and why.
        console: told of each map that is made, since on a CPU that of a large network takes minutes.
    """
    if most == 0:
        absent("Features: no maps were asked for.")
        return []
    if not (groups := mappable(found)):
        absent("Features: no run folder below the paths holds both weights (best.safetensors) and records.")
    plates, named = [], [data for data, _, _ in groups]
    for (data_name, images_digest, spelled), runs in groups.items():
        heading = f"Features: {data_name}, {spelled}"
        if named.count(data_name) > 1:
            heading += f", images {images_digest}"
        try:
            data = dataset_of(data_name, images_digest, found.runs[runs[0]].setting["shape"][1], data_dir)
            threat = parse_threat(spelled)
        except UserError as error:
            absent(f"{heading}: {error}.")
            continue
        images, class_names = few(data.test, classes=_CLASSES, each=_EACH), data.class_names[:_CLASSES]
        maps = {}
        for run in runs[:most]:
            path, name = found.runs[run].path, found.names[run]
            made_of = {"weights": digest_of_file(path / "best.safetensors"), "images": images_digest, "threat": spelled}
            file = kept / f"{run}-{setting_digest(made_of)}.npz"
            if not file.exists():
                say(console, f"mapping the features of {name}: PGD on {len(images)} images of {data_name}, then t-SNE")
            try:
                maps[name] = feature_map(
                    find_weights(path, trust_model=trust_model), images, threat, pick_device(), file
                )
            except UserError as error:
                absent(f"{heading}, {name}: {error}.")
        if maps:
            caption = (
                f"{explained(images, threat, class_names)} {len(maps)} of {len(runs)} models whose weights are there."
            )
            plates.append(FigureSection(heading, feature_maps(maps, class_names), caption))
    return plates


def mappable(found: Found) -> dict[Where, list[str]]:
    """Return for each data set the threat that most runs with weights were measured in, and these runs' ids.

    Seed by seed, since other methods tell more than other seeds; natural training first, as what the others are to be
    seen beside; else in the order of the paths.
    """
    measured: dict[Where, set[str]] = {}
    for scope, records in found.scopes().items():
        measured.setdefault(scope[:3], set()).update(record.run for record in records)
    settings = {run: each.setting for run, each in found.runs.items() if each.weights("best").is_file()}
    order = sorted(settings, key=lambda run: (settings[run]["recipe"]["seed"], settings[run]["method"] != "natural"))
    chosen: dict[tuple[str, str], tuple[Where, list[str]]] = {}
    for where, those in measured.items():
        runs = [run for run in order if run in those]
        if len(runs) > len(chosen.get(where[:2], (where, []))[1]):
            chosen[where[:2]] = (where, runs)
    return dict(chosen.values())
