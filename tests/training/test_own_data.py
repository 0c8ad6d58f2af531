"""Runs on data of the user's own: what is trained on names them and decides their draws, whatever the order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advalign.data import Dataset, load
from advalign.data.images import hold_out
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.target import load_target
from advalign.objectives import parse
from advalign.runs import Run
from advalign.training.plan import Plan
from advalign.training.planning import plan
from advalign.training.recipes import Recipe
from advalign.training.train import train

DRAW = np.random.default_rng(0)
X, Y = DRAW.integers(0, 256, (60, 8, 8), np.uint8), np.arange(60) % 3
RECIPE = Recipe(epochs=1, steps=1, batch_size=16)


def arrays(rows: Any = slice(40), test: int = 10, validation: int = 0) -> dict[str, Any]:
    parts = {"train": rows, "test": slice(40, 40 + test), "val": slice(50, 50 + validation)}
    return {
        f"{axis}_{part}": each[at] for part, at in parts.items() if len(X[at]) for axis, each in (("x", X), ("y", Y))
    }


def planned(folder: Path, content: dict[str, Any], recipe: Recipe = RECIPE, **more: Any) -> Plan:
    np.savez(folder / "mine.npz", **content)
    data = load(f"npz:{folder / 'mine.npz'}")
    return plan(parse("natural"), data, "small-cnn(width=2)", recipe, runs=folder / "runs", guests={}, **more)


def test_test_images_and_order_name_no_run_and_what_is_trained_does(tmp_path: Path):
    def of(**more: Any) -> str:
        return planned(tmp_path, arrays(**more)).run.id

    shuffled = DRAW.permutation(40)
    assert of() == of(test=9) == of(rows=shuffled)
    assert of(validation=9) == of(validation=9, rows=shuffled, test=5)
    others = [of(), of(rows=np.arange(39)), of(rows=np.arange(40) % 39), of(validation=9), of(validation=8)]
    relabelled = arrays()
    relabelled["y_train"] = np.roll(Y[:40], 1)
    others.append(planned(tmp_path, relabelled).run.id)
    assert len(set(others)) == len(others)


@pytest.mark.parametrize("changes", [{}, {"subset": 20}, {"validation": 6}])
@pytest.mark.parametrize("validation", [0, 9])
def test_data_in_another_order_are_trained_on_in_the_same_batches(
    validation: int, changes: dict[str, int], tmp_path: Path
):
    recipe = replace(RECIPE, **changes)
    plans = [
        planned(tmp_path, arrays(rows, validation=validation), recipe) for rows in (np.arange(40), DRAW.permutation(40))
    ]
    first, second = ([*each.batches(each.images[0]).epoch(3)] for each in plans)
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for one, two in zip(first, second, strict=True) for a, b in zip(one, two, strict=True))
    assert torch.equal(plans[0].images[1].pixels, plans[1].images[1].pixels)
    assert torch.equal(plans[0].images[1].labels, plans[1].images[1].labels)


def test_copies_of_an_image_are_trained_on_or_selected_on(tmp_path: Path):
    twice = planned(tmp_path, arrays(np.arange(80) % 40))
    trained, selected = (set(part.digests.tolist()) for part in twice.images)
    assert trained
    assert selected
    assert not trained & selected


def test_data_that_are_built_in_keep_their_draw(tmp_path: Path):
    digits = load("digits")
    made = plan(parse("natural"), digits, "small-cnn(width=2)", RECIPE, runs=tmp_path, guests={})
    rest, validation = hold_out(digits.train, 129, RECIPE.seed)
    assert torch.equal(made.images[0].pixels, rest.pixels)
    assert torch.equal(made.images[1].pixels, validation.pixels)
    assert made.run.setting["images"] == digits.digest
    assert made.batches(made.images[0]).order is None


def test_generated_images_count_as_seen_and_are_not_measured(tmp_path: Path):
    np.savez(tmp_path / "mine.npz", **arrays())
    np.savez(tmp_path / "more.npz", image=X[37:43], label=Y[37:43])  # with three of the ten test images
    run = train(
        "natural", data=f"npz:{tmp_path / 'mine.npz'}", model="small-cnn(width=2)", recipe=RECIPE, runs=tmp_path,
        extra=tmp_path / "more.npz", device="cpu",
    )  # fmt: skip
    measured = load_target(run.path, TargetOptions(device="cpu"))
    assert len(measured.images) == 7
    assert (
        "3 of 10 test images are left out, copies of images that the model was trained or selected on" in measured.note
    )


@pytest.mark.parametrize("name", [None, "mine"])
def test_a_run_of_an_earlier_version_is_found_and_goes_on_with_its_draws(name: str | None, tmp_path: Path):
    new = planned(tmp_path, arrays(), name=name)
    before = Run.at(tmp_path / "runs", {**new.run.setting, "images": new.dataset.digest}, name)
    before.write_card("running", {}, {})
    found = planned(tmp_path, arrays(), name=name)
    assert (found.run.path, found.run.id) == (before.path, before.id)
    assert before.id != new.run.id
    rest, validation = hold_out(found.dataset.train, 4, RECIPE.seed)
    assert torch.equal(found.images[0].pixels, rest.pixels)
    assert torch.equal(found.images[1].pixels, validation.pixels)
    assert found.batches(found.images[0]).order is None
    assert found.card["images"] == found.dataset.digest
    if name is None:  # for which a run is made anew, since the earlier version counted the test images
        assert planned(tmp_path, arrays(test=9)).run.id == new.run.id


def test_data_sets_made_in_python_are_the_users_own(tmp_path: Path):
    np.savez(tmp_path / "mine.npz", **arrays())
    loaded = load(f"npz:{tmp_path / 'mine.npz'}")
    mine = Dataset("mine", loaded.train, loaded.test, loaded.class_names)
    shuffled = replace(mine, train=mine.train.take(torch.from_numpy(DRAW.permutation(40))), test=mine.test.take([0]))

    def of(data: Dataset) -> Plan:
        return plan(parse("natural"), data, "small-cnn(width=2)", RECIPE, runs=tmp_path, guests={})

    assert of(mine).run.id == of(shuffled).run.id != of(replace(mine, name="other")).run.id
    assert torch.equal(of(mine).images[1].pixels, of(shuffled).images[1].pixels)
    before = Run.at(tmp_path, {**of(mine).run.setting, "images": mine.digest})
    before.write_card("finished", {}, {})
    assert (of(mine).run.id, of(mine).run.path) == (before.id, before.path)
    assert of(shuffled).run.id != before.id
