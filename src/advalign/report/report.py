"""The report on any set of runs: their accuracies, their trade-off, their training, and how to repeat them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from advalign.attacks.names import worst_cases_among
from advalign.errors import require
from advalign.report.balance import balance_sections
from advalign.report.commands import flags_of
from advalign.report.doubts import doubt_sections
from advalign.report.maps import feature_sections
from advalign.report.page import Section, TableSection, write_page
from advalign.report.rows import group_rows
from advalign.report.same_clean import frontiers_of, same_clean_sections
from advalign.report.sections import (
    class_sections,
    command_sections,
    gallery_sections,
    radius_sections,
    trade_off_sections,
    training_sections,
    verdict_sections,
)
from advalign.report.sources import find_sources
from advalign.report.tables import Table, accuracy_table
from advalign.report.targeted import targeted_sections
from advalign.runtime.environment import environment
from advalign.runtime.files import require_writable


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
    every table as Markdown, LaTeX and CSV and every figure as SVG, PDF and PNG. The page names what it cannot show,
    with the reason.

    Args:
        paths: run folders, folders of runs or of evaluated weights, files of records (`.jsonl`) or of results of
            `advalign evaluate` (`.json`); what is below two of them counts once.
        out: the page.
        data_dir: folder of CIFAR, for labels and test images; ADVALIGN_DATA, then the cache, if None.
        maps: models in a map of features; 0 makes none.
        trust_model: whether functions may be called that weights files name as their architecture; such models are in
            no map otherwise.

    Raises:
        UserError: a path does not exist, there are no readable records below the paths, or the page cannot be written.
    """
    require(maps >= 0, lambda: f"maps={maps} must be at least 0")
    sources, page = find_sources([Path(path) for path in paths]), Path(out)
    missing = list(sources.unreadable)
    parts = page.parent / f"{page.stem}-files"
    require(not page.is_dir(), lambda: f"{page} is a folder: name a file, such as {page / 'report.html'}")
    require(page.is_file() or not page.exists(), lambda: f"{page} is there and no file: name a file")
    require_writable(page.parent)
    flags = {run: flags_of(each.setting) for run, each in sources.runs.items()}
    scopes, all_trained = sources.scopes(), set(sources.trained)
    sections: list[Section] = doubt_sections(sources)
    tables = []
    for scope, records in scopes.items():
        unambiguous = [each._replace(images="") for each in scopes].count(scope._replace(images="")) == 1
        name = f"{scope.data}, {scope.threat}, n = {scope.n}" + ("" if unambiguous else f", images {scope.images}")
        tables.append(accuracy_table(records, flags).with_notes(sources.notes(scope)))
        sections.append(TableSection(f"Accuracy: {name}", tables[-1]))
        sections += balance_sections(name, scope, sources)
        trained = [record for record in records if record in all_trained]
        if worst_cases_among(record.attack for record in trained):
            several = len(group_rows(trained, flags)[0]) > 1
            frontiers = frontiers_of(scope, sources.frontiers)
            main = max((each for each in scopes if each.data == scope.data), key=lambda each: len(scopes[each]))
            sections += trade_off_sections(name, trained, flags, frontiers) if several or frontiers else []
            sections += same_clean_sections(name, trained, flags, frontiers)
            if several or scope == main:  # one model at another radius is in the curve over the radius
                sections += class_sections(name, scope, trained, sources, flags, data_dir, missing)
            sections += gallery_sections(name, scope, sources, missing)
    sections += feature_sections(
        sources, parts / "features", most=maps, data_dir=data_dir, trust_model=trust_model, missing=missing,
        console=console or Console(quiet=True),
    )  # fmt: skip
    for stored in sources.frontiers:
        if not any(stored in frontiers_of(scope, [stored]) for scope in scopes):
            missing.append(f"{stored.file}: no trained network was measured on its images in its threat model.")
    for make in (targeted_sections, radius_sections, training_sections, verdict_sections):
        sections += make(sources, missing)
    sections += command_sections(sources)
    introduction = [
        f"{len(sources.runs)} runs, {len(sources.records)} records. advalign uses the test set neither in training nor "
        "to choose a checkpoint."
    ]
    if untrained := {record.method for record in sources.records if not record.run}:
        introduction.append(
            f"Weights without a training record: {len(untrained)}, evaluated only. How they were trained is unknown, "
            "and whether on these test images."
        )
    write_page(page, "advalign report", introduction, None, sections, environment(), missing=missing, parts=parts)
    return tables
