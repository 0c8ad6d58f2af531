"""The curve of nearest adversaries: distances in the file, the median and the accuracy in words, the figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advalign.data import Images
from advalign.evaluation.accuracy import Evaluation
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.results import mean_distances, nearest_radii
from advalign.report.evaluation import remarks, write_evaluation
from advalign.report.nearest import accuracy_at
from advalign.runs.formats import ResultFile, read_checked_json
from advalign.threats import L2, Linf
from advalign.training.recipes import digits
from advalign.training.train import train


def test_accuracy_is_the_share_of_images_that_are_farther():
    radii = [0.0, 0.1, 0.2, float("inf")]
    assert [accuracy_at(radii, eps) for eps in (0.0, 0.05, 0.1, 0.15, 0.2, 9.0)] == [0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_images_are_read_only_where_an_attack_looks_for_the_nearest():
    class Unreadable(Images):
        def read(self, rows: slice | torch.Tensor | None = None) -> torch.Tensor:
            raise AssertionError("all images were read")

        def to(self, device: torch.device | str) -> Images:
            return self

    images, flags = Unreadable(torch.zeros(3, 1, 2, 2), torch.arange(3)), torch.tensor([True, True, False])
    correct, examples = {"clean": flags, "fgsm": flags, "ddn": flags}, {"ddn": torch.zeros(3, 1, 2, 2)}
    evaluation = Evaluation(correct, {})
    assert nearest_radii(evaluation, examples, images, Linf(0.1)) == mean_distances(evaluation, {}, images) == {}
    with pytest.raises(AssertionError, match="all images"):
        nearest_radii(evaluation, examples, images, L2(0.1))


@pytest.mark.slow
def test_the_distances_are_kept_and_shown(tmp_path: Path):
    quick = replace(digits(), epochs=1, steps=1, batch_size=128)
    run = train("natural", data="digits", model="small-cnn(width=4)", recipe=quick, runs=tmp_path, device="cpu")
    options = TargetOptions(n=40, norm="linf", eps=0.05, device="cpu")
    measured = measure(run.path, ["fmn(steps=20)", "fgsm", "ddn(steps=5)"], options)
    assert list(measured.radii) == ["fmn(steps=20)"]  # ddn is of L2
    radii, flags = torch.tensor(measured.radii["fmn(steps=20)"]), measured.evaluation.correct
    assert torch.equal(radii == 0, ~flags["clean"])
    assert torch.equal(radii.isinf(), flags["fmn(steps=20)"])
    stored = read_checked_json(measured.path, ResultFile, "again")["radii"]["fmn(steps=20)"]
    assert [each is None for each in stored] == radii.isinf().tolist()
    write_evaluation(measured, "mine")
    page = measured.path.with_suffix(".html").read_text()
    assert "Accuracy at every radius" in page
    assert "radius (Linf norm)" in page
    (line,) = [each for each in remarks(measured) if each.startswith("fmn(steps=20): median")]
    assert f"accuracy at most {100 * accuracy_at(radii.tolist(), 0.05):.1f} % at Linf(0.05)" in line
