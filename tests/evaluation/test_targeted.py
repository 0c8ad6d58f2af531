"""Targeted attacks in a measurement: success beside accuracy, in the file, the tables and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.report import report_on
from advalign.report.evaluation import evaluation_table, write_evaluation
from advalign.runs import Run
from advalign.training.recipes import digits
from advalign.training.train import train

QUICK = replace(digits(), epochs=1, steps=1, batch_size=128)
ON_40 = TargetOptions(n=40, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    return train("natural", data="digits", model="small-cnn(width=4)", recipe=QUICK, runs=folder, device="cpu")


@pytest.mark.slow
def test_success_stands_beside_accuracy(run: Run, tmp_path: Path):
    options = replace(ON_40, norm="linf", eps=0.3)
    measured = measure(run.path, ["pgd(target=3)", "fgsm"], options)
    name = "pgd(steps=20, target=3)"
    success = measured.evaluation.success[name]
    assert json.loads(measured.path.read_text())["success"] == {name: success}
    table = evaluation_table(measured)
    assert table.columns[-1] == f"{name}: success"
    assert table.rows[0][-1] == f"{100 * success:.1f}"
    assert (
        "success: share of the attacked images of other classes that is classified as the target, in %."
        in table.caption
    )
    write_evaluation(measured, "mine")
    assert f"{name}: success" in measured.path.with_suffix(".md").read_text()
    report_on([run.path], tmp_path / "report.html", maps=0)
    written = (tmp_path / "report-files" / "targeted-attacks.md").read_text()
    assert f"| {name} | {100 * measured.evaluation.accuracies()[name]:.1f} | {100 * success:.1f} |" in written


def test_without_target_no_success_is_written(run: Run):
    measured = measure(run.path, ["fgsm"], replace(ON_40, norm="linf", eps=0.1))
    assert "success" not in json.loads(measured.path.read_text())
    assert "success" not in evaluation_table(measured).caption


@pytest.mark.parametrize(
    ("attack", "options", "words"),
    [
        ("pgd(target=10)", {"eps": 0.1, "norm": "linf"}, "pgd: target=10 must be one of the classes 0 to 9"),
        (
            "worst(fgsm, mim(target=12))",
            {"eps": 0.1, "norm": "linf"},
            "mim: target=12 must be one of the classes 0 to 9",
        ),
        (
            "fgsm",
            {"eps": 128.0, "norm": "l2"},
            "l2: eps=128 is more than any two images of shape (1, 8, 8) differ by, 8;",
        ),
    ],
)
def test_what_no_image_can_use_is_refused_before_work(run: Run, tmp_path: Path, attack: str, options, words: str):
    with pytest.raises(UserError) as caught:
        measure(run.path, [attack], replace(ON_40, **options), out=tmp_path / "out")
    assert words in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))
