"""The features of a report's runs as figures: which runs are mapped, and on which images."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from advalign.errors import UserError
from advalign.report.classes import dataset_of
from advalign.report.features import feature_caption, feature_map, feature_maps, first_of_each_class
from advalign.report.page import FigureSection
from advalign.report.sources import ReportSources
from advalign.runs import find_weights, require_classes
from advalign.runs.run import setting_digest
from advalign.runtime.device import pick_device
from advalign.runtime.files import digest_of_file
from advalign.runtime.progress import say
from advalign.threats import parse_threat

_CLASSES, _EACH = 5, 50  # few, since each image is attacked with 20 steps on each model

MapGroup = tuple[str, str, str]
"""Data set, its digest, and the threat: what the maps of one figure share."""


def feature_sections(
    sources: ReportSources,
    cache: Path,
    *,
    most: int,
    data_dir: str | Path | None,
    trust_model: bool,
    missing: list[str],
    console: Console,
) -> list[FigureSection]:
    """Return maps of clean and adversarial features, a figure for each data set.

    Args:
        cache: folder of the maps, which are made anew only if weights, images or threat have changed.
        most: models in a figure.
        trust_model: whether functions may be called that weights files name as their architecture.
        missing: gets a line on each map that is not shown, with the reason.
        console: shows each map that is made, since on a CPU that of a large network takes minutes.
    """
    if most == 0:
        missing.append("Features: no maps were asked for.")
        return []
    if not (groups := mappable_runs(sources)):
        missing.append("Features: no run folder below the paths holds both weights (best.safetensors) and records.")
    sections, names = [], [data for data, _, _ in groups]
    for (data_name, images_digest, threat_text), runs in groups.items():
        heading = f"Features: {data_name}, {threat_text}"
        if names.count(data_name) > 1:
            heading += f", images {images_digest}"
        try:
            data = dataset_of(data_name, images_digest, sources.runs[runs[0]].setting["shape"][1], data_dir)
            threat = parse_threat(threat_text)
        except UserError as error:
            missing.append(f"{heading}: {error}.")
            continue
        images, class_names = first_of_each_class(data.test, _CLASSES, _EACH), data.class_names[:_CLASSES]
        maps = {}
        for run in runs[:most]:
            path, name = sources.runs[run].path, sources.names[run]
            made_of = {
                "weights": digest_of_file(path / "best.safetensors"), "images": images_digest, "threat": threat_text,
            }  # fmt: skip
            file = cache / f"{run}-{setting_digest(made_of)}.npz"
            if not file.exists():
                say(console, f"mapping the features of {name}: PGD on {len(images)} images of {data_name}, then t-SNE")
            try:
                weights = find_weights(path, trust_model=trust_model)
                require_classes(weights.path, weights.read()[1], data)
                maps[name] = feature_map(weights, images, threat, pick_device(), file)
            except UserError as error:
                missing.append(f"{heading}, {name}: {error}.")
        if maps:
            caption = (
                f"{feature_caption(images, threat, class_names)} "
                f"{len(maps)} of {len(runs)} models whose weights are there."
            )
            sections.append(FigureSection(heading, feature_maps(maps, class_names), caption))
    return sections


def mappable_runs(sources: ReportSources) -> dict[MapGroup, list[str]]:
    """Return for each data set the threat in which most runs with weights were measured, and these runs' ids.

    The runs are ordered by seed, since other methods are of more interest than other seeds; then natural training, with
    which the others are compared, comes first; then the order of the paths.
    """
    measured: dict[MapGroup, set[str]] = {}
    for scope, records in sources.scopes().items():
        measured.setdefault(scope[:3], set()).update(record.run for record in records)
    settings = {run: each.setting for run, each in sources.runs.items() if each.weights("best").is_file()}
    order = sorted(settings, key=lambda run: (settings[run]["recipe"]["seed"], settings[run]["method"] != "natural"))
    chosen: dict[tuple[str, str], tuple[MapGroup, list[str]]] = {}
    for group, ids in measured.items():
        runs, dataset = [run for run in order if run in ids], group[:2]
        if len(runs) > len(chosen.get(dataset, (group, []))[1]):
            chosen[dataset] = (group, runs)
    return dict(chosen.values())
