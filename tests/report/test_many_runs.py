"""Reports over more models than a figure can name, on runs that `benchmarks.fabricated` makes from a trained one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.fabricated import fabricate

from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.report import sections
from advalign.report.report import report_on
from advalign.report.sources import find_sources
from advalign.training.recipes import digits
from advalign.training.train import train

pytestmark = pytest.mark.slow
RUNS = 9


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, made = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("fabricated")
    recipe = replace(digits(), epochs=4, steps=1, eps=0.01, batch_size=32, subset=512)
    run = train("trades", data="digits", model="small-cnn(width=2)", recipe=recipe, runs=root, device="cpu")
    measure(run.path, ["fgsm"], TargetOptions(n=100, eps=0.01, norm="linf", device="cpu"))
    fabricate([run], made, RUNS)
    return made


def test_fabricated_runs_have_records_and_logs_of_their_own(runs: Path):
    sources = find_sources([runs])
    methods = {record.method for record in sources.records}
    assert len(methods) == len({record.run for record in sources.records}) == RUNS
    assert all(len(run.log) == 25 for run in sources.runs.values())


def test_of_many_models_the_classes_are_drawn_for_those_that_withstand_best(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    drawn, tables = [], []
    monkeypatch.setattr(sections, "MOST_NAMES", RUNS - 1)
    monkeypatch.setattr(sections, "_MAPPED_MODELS", 3)
    plain_figure, plain_table = sections.class_figure, sections.class_table
    monkeypatch.setattr(sections, "class_figure", lambda a, names: drawn.append(a) or plain_figure(a, names))
    monkeypatch.setattr(sections, "class_table", lambda a, *rest: tables.append(a) or plain_table(a, *rest))
    report_on([runs], tmp_path / "report.html", maps=0)
    (shown,), (every,) = drawn, tables
    robust = {model: float(np.mean(of_model[1])) for model, of_model in every.items()}
    assert len(every) == RUNS
    assert sorted(robust.values())[-3:] == sorted(robust[model] for model in shown)
    assert len(set(robust.values())) > 3
    assert "The 3 of 9 models that withstand best" in (tmp_path / "report.html").read_text()
