"""The sections of a report, each from what lies below its paths; `missing` gets a line on what cannot be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from advalign.attacks import ATTACKS
from advalign.attacks.names import worst_cases_among
from advalign.attacks.spelled import benchmark_of
from advalign.errors import UserError
from advalign.frontier.result import StoredFrontier
from advalign.report.classes import by_class, class_figure, class_table, dataset_of, labels_of, outcomes_of
from advalign.report.commands import diagnose_line, evaluate_line, frontier_line, repeat_frontier, train_line
from advalign.report.diagnosis import remarks_table, verdicts_table
from advalign.report.examples import COLUMNS, read_examples
from advalign.report.figures import MOST_NAMES
from advalign.report.gallery import gallery, gallery_in_words
from advalign.report.page import FigureSection, Section, TableSection, TextSection
from advalign.report.radius import Curve, radii_of, radius_curves
from advalign.report.rows import Flags, group_rows
from advalign.report.sources import ReportSources, Scope, of_frontier
from advalign.report.trade_off import trade_off_figure
from advalign.report.training import calibration_section, collapse_section, training_section
from advalign.runs import Record
from advalign.runtime.files import present
from advalign.threats import parse_threat

_GALLERY_MODELS = 6
_MAPPED_MODELS = 20  # of more than have names in a figure


def trade_off_sections(
    name: str, records: Sequence[Record], flags: Flags, frontiers: Sequence[StoredFrontier] = ()
) -> list[Section]:
    """Return clean against worst-case accuracy, and against each attack by which a benchmark compares models.

    Args:
        records: of trained networks.
        frontiers: curves on the same images.
    """
    caption = (
        "Up and to the right is better. Bars: standard deviation over seeds, where there are several. Dotted: the "
        "Pareto front, the models that no other one equals or beats in both. Point at a mark for its numbers."
    )
    if frontiers:
        caption += " Small marks on a line: settings of a frontier, attacked as the legend says; star: the chosen one."
    sections: list[Section] = [
        FigureSection(f"Trade-off: {name}", trade_off_figure(records, flags=flags, frontiers=frontiers), caption),
    ]  # fmt: skip
    for attack in filter(benchmark_of, dict.fromkeys(record.attack for record in records)):
        title = f"Trade-off, {ATTACKS[attack].__name__}: {name}"
        sections.append(FigureSection(title, trade_off_figure(records, attack, flags, frontiers), caption))
    return sections


def class_sections(
    name: str,
    scope: Scope,
    records: Sequence[Record],
    sources: ReportSources,
    flags: Flags,
    data_dir: str | Path | None,
    missing: list[str],
) -> list[Section]:
    """Return accuracy by class, of the runs whose result files have the outcomes of the worst case."""
    worst = worst_cases_among(record.attack for record in records)[0]
    contents = {
        record: result.content
        for of_model in sources.results.values()
        for result in of_model
        for record in result.records
        if result.scope == scope and record.attack == worst
    }
    if not contents.keys() & set(records):
        missing.append(f"Accuracy by class, {name}: no run folder below the paths has the outcomes of {worst}.")
        return []
    try:
        runs = (sources.runs[record.run] for record in records if record.run in sources.runs)
        sizes = (run.setting["shape"][1] for run in runs)
        data = dataset_of(scope.data, scope.images, next(sizes, 32), data_dir)
        labels, accuracies = labels_of(data, scope.n), {}
        for row in group_rows(records, flags)[0]:
            measured = [contents[record] for record in row.records if record in contents]
            if measured:
                clean, robust = zip(*(outcomes_of(content, worst) for content in measured), strict=True)
                model = ", ".join((row.method, *row.traits))
                accuracies[model] = (by_class(clean, labels, data.classes), by_class(robust, labels, data.classes))
    except UserError as error:
        missing.append(f"Accuracy by class, {name}: {error}.")
        return []
    caption = f"Robust: the worst case over the most attacks, {worst}. Means over seeds, where there are several."
    table = class_table(accuracies, data.class_names, "In %. " + caption)
    shown, chosen = accuracies, ""
    if len(accuracies) > MOST_NAMES:
        shown = dict(sorted(accuracies.items(), key=lambda of_model: -np.nanmean(of_model[1][1]))[:_MAPPED_MODELS])
        chosen = f" The {len(shown)} of {len(accuracies)} models that withstand best; the table below has all."
    return [
        FigureSection(f"Accuracy by class: {name}", class_figure(shown, data.class_names), caption + chosen),
        TableSection(f"Accuracy by class in numbers: {name}", table),
    ]


def gallery_sections(name: str, scope: Scope, sources: ReportSources, missing: list[str]) -> list[Section]:
    """Return the gallery of the adversarial examples that were saved."""
    rows, errors = {}, []
    for model, of_model in sources.results.items():
        for result in of_model:
            if result.scope == scope and present(result.examples):
                try:
                    *images_and_captions, attack = read_examples(result.examples, result.content)
                    rows[f"{sources.names[model]}\n{attack}"] = tuple(images_and_captions)
                except UserError as error:
                    errors.append(f"Adversarial examples, {name}: {error}.")
    missing += errors
    if not rows and not errors:
        missing.append(f"Adversarial examples, {name}: none were saved; advalign evaluate RUN --save-examples does.")
    if not rows:
        return []
    shown = dict(list(rows.items())[:_GALLERY_MODELS])
    caption = (
        f"The first test image of each of the first {COLUMNS} classes, its adversarial example by the strongest attack "
        "(named by the model; C&W may leave the threat model), and the difference around grey; below each its true "
        "class, the predicted class of the adversarial image, and whether it withstands. "
        f"{len(shown)} of {len(rows)} models whose examples were saved."
    )
    figure = gallery(shown, amplify=0.5 / parse_threat(scope.threat).eps)
    return [FigureSection(f"Adversarial examples: {name}", figure, caption, gallery_in_words(shown))]


def radius_sections(sources: ReportSources, missing: list[str]) -> list[Section]:
    """Return accuracy over the radius, a figure for each data set and norm."""
    curves: dict[tuple[str, str], dict[str, Curve]] = {}
    for (data, norm, model), records in _evaluated_alike(sources.records).items():
        attack, curve = radii_of(records)
        if curve:
            name = sources.names.get(model, f"{records[0].method}, {model}" if records[0].run else model)
            curves.setdefault((data, norm), {})[f"{name}: {attack}"] = curve
    for run, diagnosis in sources.diagnoses.items():
        shares = {float(eps): (share, diagnosis["n"]) for eps, share in diagnosis["accuracy_by_radius"].items()}
        if len(shares) > 1:
            figure = (diagnosis["data"], _norm_of(diagnosis["threat"]))
            curves.setdefault(figure, {})[f"{sources.names[run]}: PGD-20 of its diagnosis"] = shares
    if not curves:
        missing.append("Accuracy over the radius: evaluate runs once for each of several --eps, or diagnose them.")
    caption = "Bars: one standard error of the binomial. The radius at 0 is clean accuracy."
    return [
        FigureSection(f"Accuracy over the radius: {data}, {norm}", radius_curves(of_models), caption)
        for (data, norm), of_models in curves.items()
    ]


def _evaluated_alike(records: Sequence[Record]) -> dict[tuple[str, str, str], list[Record]]:
    """Return records by data, norm and model, of each model those that differ in attack and radius only.

    Of several such groups the one of the checkpoint `best`, then with most radii, then on most images.
    """
    groups: dict[tuple[str, str, str], dict[tuple[object, ...], list[Record]]] = {}
    for record in records:
        model = record.data, _norm_of(record.threat), record.run or record.method
        alike = (record.checkpoint, record.images, record.n, record.precision, record.attack_seed, record.batch_size)
        groups.setdefault(model, {}).setdefault(alike, []).append(record)

    def worth(group: list[Record]) -> tuple[bool, int, int]:
        return group[0].checkpoint == "best", len({record.threat for record in group}), group[0].n

    return {model: max(of_model.values(), key=worth) for model, of_model in groups.items()}


def _norm_of(threat: str) -> str:
    return type(parse_threat(threat)).__name__


def training_sections(sources: ReportSources, missing: list[str]) -> list[Section]:
    """Return the curves of the runs' logs."""
    logs = {}
    for run, each in sources.runs.items():
        try:
            logs |= {sources.names[run]: log} if (log := each.log) else {}
        except UserError as error:
            missing.append(f"Training curves, {sources.names[run]}: {error}.")
    if not logs:
        missing.append("Training curves: no run folder with a log lies below the paths.")
        return []
    further = (collapse_section(logs), calibration_section(logs))
    return [training_section(logs), *(each for each in further if each is not None)]


def verdict_sections(sources: ReportSources, missing: list[str]) -> list[Section]:
    """Return the verdicts of the newest diagnoses."""
    diagnoses = {sources.names[run]: each for run, each in sources.diagnoses.items()}
    if not diagnoses:
        missing.append("Verdicts on the evaluation: advalign diagnose RUN makes them.")
        return []
    return [
        TableSection("Can the numbers be trusted?", verdicts_table(diagnoses)),
        TableSection("Warnings and failures", remarks_table(diagnoses)),
    ]


def command_sections(sources: ReportSources) -> list[Section]:
    """Return for each model the lines that repeat it, and what it was made with."""
    folders = {run: each.path for run, each in sources.runs.items()}
    lines: dict[str, list[str]] = {}
    for run, each in sources.runs.items():
        made_with = _made_with(each.environment)
        if of_frontier(each):
            stored = next((stored for stored in sources.frontiers if stored.content.get("run") == run), None)
            line = frontier_line(each, folders) if stored is None else repeat_frontier(stored.content, folders)
            lines[run] = [f"# made and measured with {made_with}", line]
        else:
            lines[run] = [f"# trained with {made_with}", train_line(each, folders)]
    for model, of_model in sources.results.items():
        for result in of_model:
            if result.by_frontier:
                continue
            line = evaluate_line(sources.runs.get(model, result.weights), result.content, folders)
            line += " --save-examples" if result.examples.exists() else ""
            lines.setdefault(model, []).extend([f"# measured with {_made_with(result.first)}", line])
    for run, diagnosis in sources.diagnoses.items():
        lines.setdefault(run, []).append(diagnose_line(sources.runs[run], diagnosis))
    titles = {
        model: f"{sources.names[model]} ({model})" if model in sources.runs else sources.names[model]
        for model in lines
    }  # fmt: skip
    groups = {titles[model]: "\n".join(of_model) for model, of_model in lines.items()}
    return [TextSection("The commands that repeat them", groups)] if groups else []


def _made_with(fields: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {fields[key]}" for key in ("commit", "torch", "device") if fields.get(key))
