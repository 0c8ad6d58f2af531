"""The comparison of two models as a table."""

from __future__ import annotations

from advalign.attacks.spelled import remarks_on
from advalign.evaluation.compare import Comparison
from advalign.report.tables import Table


def comparison_table(comparison: Comparison) -> Table:
    """Tabulate differences in points, each with its confidence interval and p-value."""
    first, second, differences, worst, _ = comparison
    rows = []
    for d in differences:
        low, high = (100 * bound for bound in d.interval)
        gap = f"{100 * (d.second - d.first):+.1f} [{low:+.1f}, {high:+.1f}]"
        split = f"{d.only_first} / {d.only_second}"
        rows.append((d.attack, f"{100 * d.first:.1f}", f"{100 * d.second:.1f}", gap, split, f"{d.p_value:.2g}"))
    caption = (
        f"A: {first}; B: {second}; accuracy in % on the same {differences[0].n} test images. B - A in points with its "
        "95 % confidence interval for paired outcomes; images that only A and only B classifies correctly; p of "
        "McNemar's exact test. This is about these two trained models and the choice of test images, not about another "
        "training seed." + (f" Worst case: {worst}." if worst else "")
    )
    caption += "".join(f" {name}: {remark}." for name, remark in remarks_on(d.attack for d in differences).items())
    return Table(("attack", "A", "B", "B - A", "only A / only B", "p"), tuple(rows), frozenset(), caption)
