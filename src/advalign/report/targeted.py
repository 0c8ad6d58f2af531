"""Targeted attacks in a report: how many images are classified as the target."""

from __future__ import annotations

from advalign.report.page import Section, TableSection
from advalign.report.sources import ReportSources
from advalign.report.tables import Table

SUCCESS = "success: share of the attacked images of other classes that is classified as the target, in %"


def targeted_sections(sources: ReportSources, missing: list[str]) -> list[Section]:
    """Tabulate the success of targeted attacks beside the accuracy that they leave; no section without any."""
    rows = [
        (
            sources.names[model],
            result.first["threat"],
            record.attack,
            f"{100 * record.accuracy:.1f}",
            f"{100 * share:.1f}",
        )
        for model, of_model in sources.results.items()
        for result in of_model
        for record in result.records
        if (share := result.content.get("success", {}).get(record.attack)) is not None
    ]
    columns = ("method", "threat", "attack", "accuracy", "success")
    caption = f"Accuracy in %; {SUCCESS}."
    return [TableSection("Targeted attacks", Table(columns, tuple(rows), frozenset(), caption))] if rows else []
