"""The table of all methods on digits: its arithmetic on made-up records."""

from __future__ import annotations

from math import sqrt

from results.comparison import comparison

from advalign.report.rows import Row
from advalign.runs import Record
from results import comparison as comparison_module


def test_noise_is_twice_the_pooled_standard_error():
    accuracies = {"natural": (0.9, 0.92), "at": (0.70, 0.74), "at+vfd": (0.80, 0.84), "at+kd": (0.73, 0.75)}
    common = dict.fromkeys(Record.__dataclass_fields__, "") | {"n": 500, "training_images": 10, "epochs": 2}
    records = [
        Record(**{**common, "method": method, "attack": attack, "accuracy": accuracy, "seed": seed})  # pyright: ignore[reportArgumentType]
        for method, pair in accuracies.items()
        for seed, accuracy in enumerate(pair)
        for attack in ("clean", "pgd(steps=20)", "worst(pgd(steps=20))")
    ]
    variances = [(100 * (a - b)) ** 2 / 2 for a, b in accuracies.values()]
    noise = 2 * sqrt(2 * sum(variances) / 4 / 2)
    assert 2 < noise < 10
    table = comparison(records)
    assert f"{noise:.1f} points, twice" in table.caption
    changes = {row[0]: row[-1] for row in table.rows}
    assert changes == {"natural": "", "at": "", "at+vfd": "+10.0", "at+kd": "(+2.0)"}


def test_a_change_counts_if_every_seed_agrees():
    def row(*accuracies: float) -> Row:
        common = dict.fromkeys(Record.__dataclass_fields__, "")
        records = [
            Record(**{**common, "attack": "clean", "accuracy": a, "seed": seed})  # pyright: ignore[reportArgumentType]
            for seed, a in enumerate(accuracies)
        ]
        return Row("", (), tuple(records))

    base = row(0.50, 0.60, 0.70)
    assert comparison_module._change(row(0.55, 0.62, 0.79), base, "clean", 5.0) == "+5.3"
    assert comparison_module._change(row(0.45, 0.69, 0.82), base, "clean", 5.0) == "(+5.3)"
    assert comparison_module._change(row(0.55, 0.62, 0.79), base, "clean", 6.0) == "(+5.3)"
