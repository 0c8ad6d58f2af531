"""Tables for classes of unequal size: accuracy by class, and the balanced accuracy."""

from __future__ import annotations

from advalign.evaluation.by_class import IMBALANCED, ClassOutcomes
from advalign.report.page import Section, TableSection
from advalign.report.sources import ReportSources, Scope
from advalign.report.tables import Table

_BALANCED = "balanced: the mean over the classes"


def by_class_table(outcomes: ClassOutcomes) -> Table:
    """Tabulate the accuracy of each class that has images, and the balanced accuracy below."""
    columns = {name: outcomes.accuracies(name) for name in outcomes.correct}
    rows = [
        (name, str(size), *(f"{100 * accuracies[k]:.1f}" for accuracies in columns.values()))
        for k, (name, size) in enumerate(zip(outcomes.names, outcomes.sizes, strict=True))
        if size
    ]
    balanced = (f"{100 * outcomes.balanced(name):.1f}" for name in columns)
    rows.append(("balanced", str(sum(outcomes.sizes)), *balanced))
    return Table(("class", "images", *columns), tuple(rows), frozenset(), f"Accuracy in %; {_BALANCED}.")


def balance_sections(name: str, scope: Scope, sources: ReportSources) -> list[Section]:
    """Tabulate the balanced accuracies of the models of a scope; no section where the classes are of similar size."""
    counted = {
        f"{sources.names[model]}, {result.first['checkpoint']}": outcomes
        for model, of_model in sources.results.items()
        for result in of_model
        if result.scope == scope and (outcomes := ClassOutcomes.read(result.content)) and outcomes.imbalanced
    }
    if not counted:
        return []
    attacks = list(dict.fromkeys(attack for outcomes in counted.values() for attack in outcomes.correct))
    rows = tuple(
        (model, *(f"{100 * outcomes.balanced(a):.1f}" if a in outcomes.correct else "–" for a in attacks))
        for model, outcomes in counted.items()
    )
    caption = (
        f"Accuracy in %; {_BALANCED}, which count alike here. The largest class has more than {IMBALANCED:g} times the "
        "images of the smallest."
    )
    return [TableSection(f"Balanced accuracy: {name}", Table(("method", *attacks), rows, frozenset(), caption))]
