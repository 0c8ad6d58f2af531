"""Accuracy under common corruptions as a table, and as a page."""

from __future__ import annotations

from advalign.data.corruptions import MADE_HERE, SEVERITIES
from advalign.evaluation.corruptions import CLEAN, CorruptionResult
from advalign.report.page import write_page
from advalign.report.tables import Table
from advalign.runtime.environment import environment
from advalign.runtime.files import write_atomically

_SIGNATURE = ("contrast", "fog")
"""What networks trained against Linf attacks lose most by; at severity 5 they stand beside the mean."""


def corruption_table(result: CorruptionResult) -> Table:
    """Tabulate accuracies by type and severity, the clean one above, the means at the ends."""
    rows = [("clean", *[""] * len(SEVERITIES), f"{100 * float(result.correct[CLEAN].double().mean()):.1f}")]
    for kind in result.types:
        shares = [100 * result.accuracy(kind, severity) for severity in SEVERITIES]
        rows.append((kind, *(f"{share:.1f}" for share in shares), f"{sum(shares) / len(shares):.1f}"))
    by_severity = (
        100 * sum(result.accuracy(kind, severity) for kind in result.types) / len(result.types)
        for severity in SEVERITIES
    )
    rows.append(("mean", *(f"{share:.1f}" for share in by_severity), f"{100 * result.mean:.1f}"))
    name, target = result.name, result.target
    note = f"; {name}: made here with the constants of CIFAR-10-C, which it is not" if name == MADE_HERE else ""
    missing = f"; not there, and not in the mean: {', '.join(result.missing)}" if result.missing else ""
    caption = (
        f"Accuracy in % under {name} of {target.label}; data: {target.dataset.name}; test images: "
        f"{len(result.correct[CLEAN])} of each; columns 1 to 5: severity{note}{missing}."
    )
    columns = ("corruption", *map(str, SEVERITIES), "mean")
    return Table(columns, tuple(rows), frozenset(), caption).with_notes([target.note])


def corruption_line(result: CorruptionResult) -> str:
    """Return the mean, and beside it what Linf-trained networks lose most by."""
    hardest = [f"{kind}-5 {100 * result.accuracy(kind, 5):.1f} %" for kind in _SIGNATURE if kind in result.types]
    cells = len(result.types) * len(SEVERITIES)
    return "; ".join((f"{result.name}: {100 * result.mean:.2f} %, the mean over {cells} cells", *hardest))


def write_corruptions(result: CorruptionResult, source: str) -> list[str]:
    """Write the table as Markdown, LaTeX and a page beside the JSON; return the suffixes.

    Raises:
        UserError: a file cannot be written.
    """
    table, path = corruption_table(result), result.path
    write_atomically(path.with_suffix(".md"), table.markdown() + "\n")
    write_atomically(path.with_suffix(".tex"), table.latex() + "\n")
    title = f"{source} under {result.name}"
    write_page(path.with_suffix(".html"), title, [corruption_line(result)], table, [], environment())
    return [".md", ".tex", ".html"]
