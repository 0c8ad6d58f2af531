"""The study of all methods at toy size; its arithmetic on made-up records."""

from __future__ import annotations

from dataclasses import replace
from math import sqrt
from pathlib import Path

import pytest
from rich.console import Console

from advalign.objectives import parse
from advalign.report.tables import Row
from advalign.runs import Record, read_records
from advalign.studies import methods as study
from advalign.training.recipes import digits


def test_every_method_of_the_study_is_one():
    assert len(study.METHODS) == 37
    for method in study.METHODS:
        assert str(parse(method)) == method


def test_it_trains_evaluates_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(study, "digits", lambda: replace(digits(), epochs=1, steps=1, subset=256, batch_size=128))
    monkeypatch.setattr(study, "METHODS", ("natural", "at", "at+vfd"))
    monkeypatch.setattr(study, "MODEL", "small-cnn(width=4)")
    monkeypatch.setattr(study, "ATTACKS", ("pgd(steps=20)",))
    quiet = Console(quiet=True)
    records = study.methods(tmp_path, (0, 1), quiet)
    assert read_records(tmp_path / "records.jsonl") == records
    assert {(record.method, record.seed) for record in records} == {
        (method, seed) for method in ("natural", "at", "at+vfd") for seed in (0, 1)
    }
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert study.methods(tmp_path, (0, 1), quiet) == records
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    table = study.comparison(records)
    assert [row[0] for row in table.rows] == ["natural", "at", "at+vfd"]


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
    table = study.comparison(records)
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
    assert study._change(row(0.55, 0.62, 0.79), base, "clean", 5.0) == "+5.3"
    assert study._change(row(0.45, 0.69, 0.82), base, "clean", 5.0) == "(+5.3)"
    assert study._change(row(0.55, 0.62, 0.79), base, "clean", 6.0) == "(+5.3)"
