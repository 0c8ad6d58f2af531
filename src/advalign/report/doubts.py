"""What makes numbers of a report doubtful: the warnings of trainings and of evaluations."""

from __future__ import annotations

from advalign.report.page import Section, TableSection
from advalign.report.sources import ReportSources
from advalign.report.tables import Table


def doubt_sections(sources: ReportSources) -> list[Section]:
    """Tabulate the warnings, each once; no section without any."""
    of_runs = [(sources.names[run], "training", each.warning) for run, each in sources.runs.items()]
    of_results = [
        (sources.names[model], "evaluation", warning)
        for model, of_model in sources.results.items()
        for result in of_model
        for warning in result.content.get("warnings", ())
    ]
    rows = tuple(dict.fromkeys(row for row in (*of_runs, *of_results) if row[2]))
    caption = "What the training and the evaluation themselves have noticed."
    table = Table(("method", "by", "warning"), rows, frozenset(), caption, prose=True)
    return [TableSection("Doubtful numbers", table)] if rows else []
