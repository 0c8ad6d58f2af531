"""Several radii in one command: each as it would be alone, one clean pass, and what only a smaller radius breaks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advalign.cli import commands as cli
from advalign.evaluation.evaluator import Evaluator
from advalign.evaluation.measure import measure, measure_radii
from advalign.evaluation.options import TargetOptions
from advalign.report.radii import curves_of, radius_remarks
from advalign.runs import Run
from advalign.training.recipes import digits
from advalign.training.train import train

ATTACKS = ["fgsm", "pgd(steps=2)"]
ON_60 = TargetOptions(n=60, device="cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    recipe = replace(digits(), epochs=2, steps=1, batch_size=128)
    folder = tmp_path_factory.mktemp("runs")
    return train("natural", data="digits", model="small-cnn(width=4)", recipe=recipe, runs=folder, device="cpu")


def test_each_radius_is_what_it_would_be_alone_and_clean_images_pass_once(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    logits, images = Evaluator._logits, []
    monkeypatch.setattr(Evaluator, "_logits", lambda self, x: images.append(len(x)) or logits(self, x))
    several = measure_radii(run.path, [0.2, 0.02, 0.1], ATTACKS, ON_60, out=tmp_path / "several")
    with_several = sum(images)
    images.clear()
    alone = [
        measure(run.path, ATTACKS, replace(ON_60, norm="linf", eps=eps), out=tmp_path / "alone")
        for eps in (0.02, 0.1, 0.2)
    ]
    assert sum(images) == with_several + 2 * 60
    for one, other in zip(several, alone, strict=True):
        contents = [json.loads(each.path.read_text()) for each in (one, other)]
        for content in contents:
            for record in content["records"]:
                record["seconds"] = 0
        for content in contents:
            content.pop("environment")
        assert contents[0].keys() == contents[1].keys()
        assert {k: v for k, v in contents[0].items() if k != "checksum"} == {
            k: v for k, v in contents[1].items() if k != "checksum"
        }
        assert one.path.name == other.path.name
    curve = curves_of(several)["worst case"]
    assert list(curve) == [0.0, 0.02, 0.1, 0.2]
    assert curve[0.1] == (alone[1].evaluation.accuracies()["worst case"], 60)


def test_images_that_only_a_smaller_radius_breaks_are_counted(run: Run, tmp_path: Path):
    several = measure_radii(run.path, [0.05, 0.1], ["fgsm"], ON_60, out=tmp_path)
    broken, withstands = several[0].evaluation.correct["fgsm"], several[1].evaluation.correct["fgsm"]
    broken.copy_(torch.tensor([False] * 3 + [True] * 57))
    withstands.copy_(torch.tensor([True] * 4 + [False] * 56))
    (line,) = radius_remarks(several)
    assert line.startswith("fgsm: 3 of 60 images withstand at Linf(0.1) though Linf(0.05) breaks them")
    withstands[:3] = False
    assert not list(radius_remarks(several))


@pytest.mark.slow
def test_the_command_takes_the_run_before_and_behind_the_radii(run: Run, tmp_path: Path, capsys):
    for k, words in enumerate((["--eps", "1/20", "0.1", str(run.path)], [str(run.path), "--eps=0.05", "--eps", "0.1"])):
        cli.main(["evaluate", *words, "--attacks", "fgsm", "-n", "20", "--out", str(tmp_path / str(k))])
        assert capsys.readouterr().out.count("Linf(0.1)") >= 3
    pages = sorted(tmp_path.rglob("best-radii-*.html"))
    assert len(pages) == 2
    assert pages[0].name == pages[1].name
    (table,) = tmp_path.glob("0/best-radii-*-files/table.md")
    assert "Linf(0.05)" in table.read_text()
    assert list(tmp_path.glob("0/best-radii-*-files/accuracy-over-the-radius.svg"))
