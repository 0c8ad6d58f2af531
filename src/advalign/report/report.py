"""The report on any set of runs: their accuracies, their trade-off, their training, and how to repeat them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from advalign.attacks.names import worst_cases_among
from advalign.errors import UserError, require
from advalign.report.classes import by_class, class_figure, class_table, dataset_of, labels_of, outcomes_of
from advalign.report.commands import evaluate_line, flags_of, train_line, trust_of
from advalign.report.diagnosis import remarks_table, verdicts_table
from advalign.report.examples import COLUMNS, read_examples
from advalign.report.figures import calibration_curves, gallery, gallery_in_words, trade_off, training_curves
from advalign.report.maps import feature_plates
from advalign.report.page import FigureSection, TableSection, TextSection, write_page
from advalign.report.radius import Curve, radii_of, radius_curves
from advalign.report.sources import Found, Scope, find
from advalign.report.tables import Flags, Table, accuracy_table, rows_of
from advalign.runs import Record
from advalign.runtime.environment import environment
from advalign.runtime.files import read_json, require_writable
from advalign.spelling import spell_number
from advalign.threats import parse_threat

CALIBRATION = (
    "Distance of the student's features to the vanilla model's, and VFD's gradient at those features beside that of "
    "what teaches labels, on the first batch of each epoch."
)
_BANDS = 6  # models in the gallery

Section = FigureSection | TableSection | TextSection
Say = Callable[[str], None]


def report_on(
    paths: Sequence[str | Path],
    out: str | Path,
    data_dir: str | Path | None = None,
    *,
    maps: int = 4,
    trust_model: bool = False,
    console: Console | None = None,
) -> list[Table]:
    """Write one HTML page on the runs and records below the paths, and return its tables of accuracies.

    There is one table for each data set, threat and number of test images. Beside PAGE.html lies `PAGE-files`, with
    every table as Markdown, LaTeX and CSV and every figure as SVG, PDF and PNG. What the page does not show it names,
    with the reason.

    Args:
        paths: run folders, folders of runs or of evaluated weights, files of records (`.jsonl`) or of results of
            `advalign evaluate` (`.json`); what is found twice counts once.
        data_dir: where CIFAR lies, for labels and test images; ADVALIGN_DATA, then the cache, if not given.
        maps: models in a map of features; 0 makes none.
        trust_model: whether functions may be called that weights files name as their architecture; else such models are
            in no map.

    Raises:
        UserError: a path does not exist, there are no records below the paths, a file is damaged, or the page cannot be
            written.
    """
    require(maps >= 0, lambda: f"maps={maps} must be at least 0")
    found, page, absent = find([Path(path) for path in paths]), Path(out), []
    parts = page.parent / f"{page.stem}-files"
    require(not page.is_dir(), lambda: f"{page} is a folder: name a file, such as {page / 'report.html'}")
    require_writable(page.parent)
    flags = {run: flags_of(each.setting) for run, each in found.runs.items()}
    scopes = found.scopes()
    sections: list[Section] = []
    tables = []
    for scope, records in scopes.items():
        named = [each._replace(images="") for each in scopes].count(scope._replace(images="")) == 1
        name = f"{scope.data}, {scope.threat}, n = {scope.n}" + ("" if named else f", images {scope.images}")
        tables.append(accuracy_table(records, flags))
        sections.append(TableSection(f"Accuracy: {name}", tables[-1]))
        if worst_cases_among(record.attack for record in records):
            many = len(rows_of(records, flags)[0]) > 1
            main = max((each for each in scopes if each.data == scope.data), key=lambda each: len(scopes[each]))
            sections += _trade_offs(name, records, flags) if many else []
            if many or scope == main:  # a model by itself at another radius is told by the curve over the radius
                sections += _classes(name, scope, records, found, flags, data_dir, absent.append)
            sections += _gallery(name, scope, found, absent.append)
    console = console or Console(quiet=True)
    sections += [
        *feature_plates(
            found,
            parts / "features",
            most=maps,
            data_dir=data_dir,
            trust_model=trust_model,
            absent=absent.append,
            console=console,
        ),
        *_radii(found, absent.append),
        *_training(found, absent.append),
        *_verdicts(found, absent.append),
        *_commands(found),
    ]
    introduction = [
        f"{len(found.runs)} runs, {len(found.records)} records. The test set takes no part in advalign's training, nor "
        "in its choice of a checkpoint."
    ]
    if alone := {record.method for record in found.records if not record.run}:
        introduction.append(
            f"Weights from elsewhere: {len(alone)}, evaluated only. Nobody knows how they were trained, nor whether on "
            "these test images."
        )
    write_page(page, "advalign report", introduction, None, sections, environment(), absent=absent, parts=parts)
    return tables


def _trade_offs(name: str, records: Sequence[Record], flags: Flags) -> list[Section]:
    caption = (
        "Up and to the right is better. Bars: standard deviation over seeds, where there are several. Dotted: the "
        "models that no other one equals or beats in both. Point at a mark for its numbers."
    )
    plates: list[Section] = [FigureSection(f"Trade-off: {name}", trade_off(records, flags=flags), caption)]
    if any(record.attack == "autoattack" for record in records):
        figure = trade_off(records, "autoattack", flags)
        plates.append(FigureSection(f"Trade-off, AutoAttack: {name}", figure, caption))
    return plates


def _classes(
    name: str,
    scope: Scope,
    records: Sequence[Record],
    found: Found,
    flags: Flags,
    data_dir: str | Path | None,
    say: Say,
) -> list[Section]:
    """Return accuracy by class, of the runs whose outcomes of the worst case lie in their folders."""
    worst = worst_cases_among(record.attack for record in records)[0]
    evaluations = {
        record: evaluated.content
        for each in found.evaluations.values()
        for evaluated in each
        for record in evaluated.records
        if evaluated.scope == scope and record.attack == worst
    }
    if not evaluations.keys() & set(records):
        say(f"Accuracy by class, {name}: no run folder below the paths has the outcomes of {worst}.")
        return []
    try:
        sizes = (run.setting["shape"][1] for run in found.runs.values() if run.setting["data"] == scope.data)
        data = dataset_of(scope.data, scope.images, next(sizes, 32), data_dir)
        accuracies = {}
        for row in rows_of(records, flags)[0]:
            behind = [evaluations[record] for record in row.records if record in evaluations]
            if behind:
                labels = labels_of(data, scope.n)
                clean, robust = zip(*(outcomes_of(each, worst) for each in behind), strict=True)
                model = ", ".join((row.method, *row.traits))
                accuracies[model] = (
                    by_class(clean, labels, data.classes),
                    by_class(robust, labels, data.classes),
                )
    except UserError as error:
        say(f"Accuracy by class, {name}: {error}.")
        return []
    caption = f"Robust: the worst case over the most attacks, {worst}. Means over seeds, where there are several."
    return [
        FigureSection(f"Accuracy by class: {name}", class_figure(accuracies, data.class_names), caption),
        TableSection(
            f"Accuracy by class in numbers: {name}", class_table(accuracies, data.class_names, "In %. " + caption)
        ),
    ]


def _gallery(name: str, scope: Scope, found: Found, say: Say) -> list[Section]:
    bands, doubts = {}, []
    for run, evaluations in found.evaluations.items():
        for evaluated in evaluations:
            if evaluated.scope == scope and evaluated.examples.exists():
                try:
                    *shown, attack = read_examples(evaluated.examples, evaluated.content)
                    bands[f"{found.names[run]}\n{attack}"] = tuple(shown)
                except UserError as error:
                    doubts.append(f"Adversarial examples, {name}: {error}.")
    for doubt in doubts:
        say(doubt)
    if not bands and not doubts:
        say(f"Adversarial examples, {name}: none were saved; advalign evaluate RUN --save-examples does.")
    if not bands:
        return []
    shown = dict(list(bands.items())[:_BANDS])
    eps = parse_threat(scope.threat).eps
    caption = (
        f"The first test image of each of the first {COLUMNS} classes, what the attack that leaves least makes of it "
        "(named by the model; C&W may leave the threat), and the difference around grey; below each its true class, "
        "what the model takes the adversarial image for, and whether it withstands. "
        f"{len(shown)} of {len(bands)} models whose examples were saved."
    )
    return [
        FigureSection(
            f"Adversarial examples: {name}", gallery(shown, amplify=0.5 / eps), caption, gallery_in_words(shown)
        )
    ]


def _radii(found: Found, say: Say) -> list[Section]:
    """Return accuracy over the radius, a figure for each data set and norm."""
    measured: dict[tuple[str, str, str], list[Record]] = {}
    for record in found.records:
        model = record.run or record.method
        measured.setdefault((record.data, type(parse_threat(record.threat)).__name__, model), []).append(record)
    curves: dict[tuple[str, str], dict[str, Curve]] = {}
    for (data, norm, model), records in measured.items():
        attack, curve = radii_of(records)
        if curve:
            name = found.names.get(model, f"{records[0].method}, {model}" if records[0].run else model)
            curves.setdefault((data, norm), {})[f"{name}: {attack}"] = curve
    for run, diagnosis in found.diagnoses.items():
        shares = {float(eps): (share, diagnosis["n"]) for eps, share in diagnosis["accuracy_by_radius"].items()}
        if len(shares) > 1:
            where = (diagnosis["data"], type(parse_threat(diagnosis["threat"])).__name__)
            curves.setdefault(where, {})[f"{found.names[run]}: PGD-20 of its diagnosis"] = shares
    if not curves:
        say("Accuracy over the radius: evaluate runs once for each of several --eps, or diagnose them.")
    caption = "Bars: one standard error of the binomial. The radius at 0 is clean accuracy."
    return [
        FigureSection(f"Accuracy over the radius: {data}, {norm}", radius_curves(each), caption)
        for (data, norm), each in curves.items()
    ]


def _training(found: Found, say: Say) -> list[Section]:
    logs = {found.names[run]: log for run, each in found.runs.items() if (log := each.log)}
    if not logs:
        say("Training curves: no run folder with a log lies below the paths.")
        return []
    curves = training_curves(logs)
    plates: list[Section] = [
        FigureSection("Training", curves, "Loss on the training images, accuracy on held-out ones.")
    ]
    if calibrated := {name: log for name, log in logs.items() if "vfd" in log[0].get("calibration", {})}:
        plates.append(FigureSection("Calibration of VFD", calibration_curves(calibrated), CALIBRATION))
    return plates


def _verdicts(found: Found, say: Say) -> list[Section]:
    diagnoses = {found.names[run]: each for run, each in found.diagnoses.items()}
    if not diagnoses:
        say("Verdicts on the evaluation: advalign diagnose RUN makes them.")
        return []
    return [
        TableSection("Can the numbers be trusted?", verdicts_table(diagnoses)),
        TableSection("Warnings and failures", remarks_table(diagnoses)),
    ]


def _commands(found: Found) -> list[Section]:
    """Return for each model the lines that repeat it, and where it was made."""
    places = {run: each.path for run, each in found.runs.items()}
    lines: dict[str, list[str]] = {}
    for run, each in found.runs.items():
        here = read_json(each.path / "run.json").get("environment", {})
        made = ", ".join(f"{key} {here[key]}" for key in ("commit", "torch", "device") if here.get(key))
        lines[run] = [f"# trained with {made}", train_line(each, places)]
    for model, evaluations in found.evaluations.items():
        for evaluated in evaluations:
            first, source = evaluated.first, found.runs.get(model, evaluated.weights)
            made = ", ".join(f"{key} {first[key]}" for key in ("commit", "torch", "device") if first[key])
            line = evaluate_line(source, evaluated.content, places)
            told = [f"# measured with {made}", line + (" --save-examples" if evaluated.examples.exists() else "")]
            lines.setdefault(model, []).extend(told)
    for run, diagnosis in found.diagnoses.items():
        threat = parse_threat(diagnosis["threat"])
        words = [
            "advalign",
            "diagnose",
            str(found.runs[run].path),
            "--data",
            diagnosis["data"],
            "--n",
            str(diagnosis["n"]),
            *trust_of(found.runs[run]),
        ]
        lines.setdefault(run, []).append(shlex.join([*words, "--norm", threat.norm, "--eps", spell_number(threat.eps)]))
    titles = {
        model: f"{found.names[model]} ({model})" if model in found.runs else found.names[model] for model in lines
    }
    groups = {titles[model]: "\n".join(those) for model, those in lines.items()}
    return [TextSection("The commands that repeat them", groups)] if groups else []
