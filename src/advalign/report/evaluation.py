"""A measurement as files to read: tables, an HTML page, a RobustBench card; and what to say about it in lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from advalign.evaluation.interval import wilson
from advalign.evaluation.results import Measurement
from advalign.report.balance import by_class_table
from advalign.report.card import card_attack, published_fields, robustbench_card
from advalign.report.nearest import nearest_remarks, nearest_sections
from advalign.report.page import TableSection, write_page
from advalign.report.tables import Table, accuracy_table
from advalign.report.targeted import SUCCESS
from advalign.runtime.environment import environment
from advalign.runtime.files import write_atomically, write_json


def write_evaluation(measured: Measurement, source: str) -> list[str]:
    """Write Markdown, LaTeX, HTML and, where its attack was run, a card for RobustBench beside the result.

    Args:
        source: what was measured, for the page's title.

    Returns:
        The suffixes of the files.

    Raises:
        UserError: a file cannot be written.
    """
    path, table = measured.path, evaluation_table(measured)
    classes = [by_class_table(measured.by_class)] if measured.by_class.imbalanced else []
    write_atomically(path.with_suffix(".md"), "\n\n".join(each.markdown() for each in (table, *classes)) + "\n")
    write_atomically(path.with_suffix(".tex"), table.latex() + "\n")
    unknown = [] if measured.has_training_record else ["Weights without a training record."]
    introduction = [*unknown, *measured.evaluation.warnings]
    sections = [*nearest_sections(measured), *(TableSection("Accuracy by class", each) for each in classes)]
    write_page(path.with_suffix(".html"), f"Evaluation of {source}", introduction, table, sections, environment())
    if card_attack(measured.records) is None:
        return [".md", ".tex", ".html"]
    card = robustbench_card(measured.records, extra_data=measured.extra_data)
    if measured.published is not None:
        card |= published_fields(measured.published)
    write_json(path.with_suffix(".robustbench.json"), card)
    return [".md", ".tex", ".html", ".robustbench.json"]


def evaluation_table(measured: Measurement) -> Table:
    """Tabulate the accuracies and, beside them, the success of targeted attacks."""
    table, success = accuracy_table(measured.records), measured.evaluation.success
    if success:
        table = replace(
            table,
            columns=(*table.columns, *(f"{name}: success" for name in success)),
            rows=tuple((*row, *(f"{100 * share:.1f}" for share in success.values())) for row in table.rows),
            caption=f"{table.caption.removesuffix('.')}; {SUCCESS}.",
        )
    return replace(table, caption=f"{table.caption} {_intervals(measured)}").with_notes([measured.note])


def _intervals(measured: Measurement) -> str:
    """Return the sentence on how sure each accuracy is."""
    outcomes, n = measured.evaluation.outcomes, len(measured.evaluation)
    bounds = {name: wilson(int(right.sum()), n) for name, right in outcomes.items()}
    texts = (f"{name} {100 * low:.1f} to {100 * high:.1f}" for name, (low, high) in bounds.items())
    return f"95 % intervals (Wilson) over the choice of {n} test images, of this one model: {'; '.join(texts)}."


def remarks(measured: Measurement) -> Iterator[str]:
    """Yield what the table does not show: warnings, distances of unbounded attacks, and what each attack has cost."""
    evaluation = measured.evaluation
    for warning in evaluation.warnings:
        yield f"warning: {warning}"
    yield from nearest_remarks(measured)
    for name in filter(evaluation.unbounded.__contains__, evaluation.correct):
        if name in measured.radii:
            continue
        distance = measured.distances.get(name)
        result = (
            "no image fools"
            if distance is None
            else f"the images that fool lie at a mean L2 distance of {distance:.3f}"
        )
        yield f"{name}: {result}; not confined to the threat model, so no part of the worst case"
    n = len(evaluation)
    for name, (forward, backward) in evaluation.passes.items():
        yield f"{name}: {forward / n:.1f} forward and {backward / n:.1f} backward passes an image"
