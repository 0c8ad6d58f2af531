"""The names of the classes are part of a run: in its card, in its weights, and in what its guests must be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from advalign.data import Dataset, Images
from advalign.errors import UserError
from advalign.runs import Run
from advalign.runs.checkpoint import load_weights
from advalign.training.recipes import Recipe
from advalign.training.train import train

RECIPE = Recipe(epochs=1, steps=1, batch_size=16, validation=8)


def animals(*names: str, **more: Any) -> Dataset:
    draw = torch.Generator().manual_seed(0)
    images = Images(
        torch.randint(0, 256, (40, 1, 8, 8), generator=draw, dtype=torch.uint8), torch.arange(40) % len(names)
    )
    return Dataset("animals", images, images.take(list(range(10))), names, **more)


def trained(method: str, data: Dataset, folder: Path, **more: Any) -> Run:
    return train(method, data=data, model="small-cnn(width=2)", recipe=RECIPE, runs=folder, device="cpu", **more)


def test_a_run_says_its_classes_and_what_was_done_to_its_images(tmp_path: Path):
    steps = {"resize": "shorter side to 8, bicubic", "crop": "centre"}
    run = trained("natural", animals("cat", "dog", preprocessing=steps), tmp_path)
    card = json.loads((run.path / "run.json").read_text())
    for says in (card, *(load_weights(run.weights(each))[1] for each in ("best", "last"))):
        assert says["class_names"] == ["cat", "dog"]
        assert says["preprocessing"] == steps
    assert "preprocessing" not in card["setting"]
    unnamed = trained("natural", animals("0", "1", named=False), tmp_path / "unnamed")
    says = json.loads((unnamed.path / "run.json").read_text())
    assert not {"class_names", "preprocessing"} & {*says, *load_weights(unnamed.weights("best"))[1]}
    assert Run.read(unnamed.path).finished


def test_a_guest_of_other_classes_is_refused(tmp_path: Path):
    guest = trained("natural", animals("cat", "dog"), tmp_path)
    for names, message in [
        (("dog", "cat"), r"other classes: number 0 is 'cat' in .*, but 'dog' in animals; .* in the same order"),
        (("cat", "Dog"), r"number 1 is 'dog' in .*, but 'Dog' in animals; .* same order; is 'Dog' meant as 'dog'\?"),
        (("cat", "wolf"), r"other classes: number 1 is 'dog' in .*, but 'wolf' in animals"),
        (("cat", "dog", "owl"), r"wrong number of classes: .* has 2, the data set animals has 3"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            trained("at+kd", animals(*names), tmp_path / "student", guests={"vanilla": guest.path})
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "student").exists()


def test_test_images_alone_train_nothing(tmp_path: Path):
    data = animals("cat", "dog")
    alone = replace(data, train=data.test.take([]))
    with pytest.raises(UserError, match="animals has no training images, only 10 test images"):
        trained("at", alone, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_float_images_are_trained_on_as_they_are(tmp_path: Path):
    """Floats that are the pixels over 255 make the same run to the bit; floats between them another."""
    data = animals("cat", "dog")
    as_floats = replace(data, train=Images(data.train.floats(), data.train.labels))
    finer = replace(data, train=Images((data.train.floats() + 1e-3).clamp(max=1), data.train.labels))
    runs = [trained("at", each, tmp_path / str(k)) for k, each in enumerate((data, as_floats, finer))]
    first, same, other = (load_weights(run.weights("last"))[0] for run in runs)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
