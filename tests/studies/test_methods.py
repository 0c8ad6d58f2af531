"""The study of all methods at toy size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from results.comparison import comparison

from advalign.objectives import BASES, PLUGINS, parse
from advalign.runs import read_records
from advalign.studies import SCALES, run_study
from advalign.studies import demo as demo_module
from advalign.studies import methods as methods_module
from advalign.training.recipes import digits


def test_every_method_of_the_study_is_one():
    assert {parse(method).base.name for method in methods_module.EVERY_METHOD} == set(BASES)
    assert {plugin.name for method in methods_module.EVERY_METHOD for plugin in parse(method).plugins} == set(PLUGINS)
    assert len(set(methods_module.EVERY_METHOD)) == len(methods_module.EVERY_METHOD)
    for method in methods_module.EVERY_METHOD:
        assert str(parse(method)) == method


@pytest.mark.slow
def test_it_trains_evaluates_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy = replace(digits(), epochs=1, steps=1, subset=256, batch_size=128)
    monkeypatch.setattr(methods_module, "digits", lambda: toy)
    monkeypatch.setattr(methods_module, "EVERY_METHOD", ("natural", "at", "at+vfd"))
    monkeypatch.setattr(methods_module, "MODEL", "small-cnn(width=4)")
    monkeypatch.setattr(demo_module, "DEMO_ATTACKS", ("fgsm", "pgd(steps=20)"))
    study = methods_module.methods_study(SCALES["tiny"])
    assert study.seeds == 5
    study = replace(study, columns=study.columns[:-1])  # AutoAttack takes too long here
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out", "device": "cpu"}
    records = run_study(study, seeds=2, **folders).records()
    assert read_records(tmp_path / "out" / "records.jsonl") == records
    assert [(record.seed, record.method, record.attack) for record in records] == [
        (seed, method, attack)
        for seed in (0, 1)
        for method in ("natural", "at", "at+vfd")
        for attack in ("clean", "fgsm", "pgd(steps=20)", "worst(fgsm, pgd(steps=20))")
    ]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert run_study(study, seeds=2, **folders).records() == records
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    table = comparison(records)
    assert [row[0] for row in table.rows] == ["natural", "at", "at+vfd"]
