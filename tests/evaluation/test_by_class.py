"""Outcomes by class: against scikit-learn, and in all that an evaluation and a report show."""

from __future__ import annotations

import json
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, recall_score

from advalign.cli import commands as cli
from advalign.errors import UserError
from advalign.evaluation.by_class import ClassOutcomes
from advalign.runs.formats import ResultFile, read_checked_json, write_checked_json

NAMES = ("cat", "dog", "owl", "yak")


def test_counts_give_recall_and_balanced_accuracy():
    draw = torch.Generator().manual_seed(0)
    labels = torch.multinomial(torch.tensor([0.7, 0.2, 0.1]), 200, replacement=True, generator=draw)
    predicted = torch.where(torch.rand(200, generator=draw) < 0.6, labels, (labels + 1) % 3)
    outcomes = ClassOutcomes.count(NAMES, labels, {"clean": predicted == labels})
    assert sum(outcomes.sizes) == 200
    assert outcomes.sizes[3] == 0
    assert outcomes.imbalanced
    recalls = recall_score(labels, predicted, average=None)  # pyright: ignore[reportArgumentType] (it means: of each)
    assert outcomes.accuracies("clean")[:3] == pytest.approx(recalls)
    assert isnan(outcomes.accuracies("clean")[3])
    assert outcomes.balanced("clean") == pytest.approx(balanced_accuracy_score(labels, predicted))


@pytest.mark.parametrize(("sizes", "imbalanced"), [((3, 2), False), ((4, 2), True), ((5, 0, 5), False), ((7,), False)])
def test_a_class_is_small_below_two_thirds_of_the_largest(sizes: tuple[int, ...], imbalanced: bool):
    assert ClassOutcomes([""] * len(sizes), sizes, {}).imbalanced is imbalanced


def write_arrays(file: Path, sizes: tuple[int, ...]) -> None:
    """Write images of which a dark one is more often of class 0."""
    y = np.repeat(np.arange(len(sizes)), sizes)
    x = (np.random.default_rng(0).integers(0, 60, (len(y), 8, 8, 3)) + 60 * y[:, None, None, None]).astype(np.uint8)
    np.savez(file, x_train=x, y_train=y, x_test=x + 1, y_test=y, class_names=list(NAMES[: len(sizes)]))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "shown"), [((60, 20, 10), True), ((30, 30, 30), False)])
def test_what_is_shown_of_classes_of_unequal_size(
    sizes: tuple[int, ...], shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_arrays(tmp_path / "a.npz", sizes)
    words = ["--data", f"npz:{tmp_path / 'a.npz'}", "--model", "small-cnn(width=2)", "--runs", str(tmp_path)]
    words += ["--batch-size", "16", "--validation", "9", "--epochs", "1", "--name", "run", "--device", "cpu"]
    cli.main(["train", "natural", *words, "--lr", "1e-9"])  # no better than one answer: the report says so
    cli.main(["evaluate", str(tmp_path / "run"), "--attacks", "fgsm", "--device", "cpu"])
    said = capsys.readouterr().out
    (file,) = (tmp_path / "run" / "evaluations").glob("*[0-9a-f].json")
    content = read_checked_json(file, ResultFile, "")
    outcomes = ClassOutcomes.read(content)
    assert outcomes is not None
    assert outcomes.sizes == list(sizes)
    assert sum(outcomes.correct["clean"]) == content["outcomes"]["clean"].count("1")
    assert set(outcomes.correct) == {"clean", "fgsm", "worst case"}
    balanced = f"{100 * outcomes.balanced('clean'):.1f}"
    pages = [said, *(file.with_suffix(ending).read_text() for ending in (".md", ".html"))]
    cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html"), "--maps", "0"])
    pages.append((tmp_path / "page.html").read_text())
    for page in pages:
        assert ("balanced" in page.lower()) is shown
        assert not shown or balanced in page
    assert "Doubtful numbers" in pages[-1]
    assert pages[-1].count("better than always answering the largest class") >= 2  # in training, and in evaluation


def test_counts_of_other_images_are_refused(tmp_path: Path):
    write_arrays(tmp_path / "a.npz", (12, 6))
    words = ["--data", f"npz:{tmp_path / 'a.npz'}", "--model", "small-cnn(width=2)", "--runs", str(tmp_path)]
    cli.main(["train", "natural", *words, "--batch-size", "8", "--validation", "4", "--epochs", "1", "--name", "run"])
    cli.main(["evaluate", str(tmp_path / "run"), "--attacks", "none"])
    (file,) = (tmp_path / "run" / "evaluations").glob("*[0-9a-f].json")
    content = json.loads(file.read_text())
    del content["checksum"], content["format"]
    content["class_sizes"] = [12, 7]
    write_checked_json(file, content)
    with pytest.raises(UserError, match="the classes' counts are not those of 18 images"):
        read_checked_json(file, ResultFile, "")
