"""The test set stays the test set: what a model has seen is found by content, left out, and said."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from advalign import models
from advalign.data import Dataset, Images, load
from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.overlap import leave_out_seen
from advalign.evaluation.target import load_target
from advalign.evaluation.transfer_matrix import transfer_matrix
from advalign.runs import Run
from advalign.runs.checkpoint import load_weights
from advalign.runs.trained_on import FILE, read_trained_on
from advalign.runtime.sealed import Owner, seal_npy
from advalign.training.recipes import digits
from advalign.training.train import train

RECIPE = replace(digits(), epochs=1, steps=1, batch_size=8, validation=4)
MODEL = "small-cnn(width=2)"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def photo(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8))


def photos(root: Path, numbers: range) -> Path:
    """Write the images of these numbers, in two classes by turns."""
    for number in numbers:
        folder = root / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(number).save(folder / f"{number}.png")
    return root


def digest_of(number: int) -> int:
    pixels = torch.from_numpy(np.asarray(photo(number)).transpose(2, 0, 1).copy())
    return int(Images(pixels[None], torch.zeros(1, dtype=torch.long)).digests[0])


def fit(data: str | Dataset, runs: Path, init: str | Path | None = None, **changes: int | None) -> Run:
    recipe = replace(RECIPE, **changes)
    return train("natural", data=data, model=MODEL, recipe=recipe, runs=runs, image_size=8, device="cpu", init=init)


def on(data: str) -> TargetOptions:
    return TargetOptions(data=data, image_size=8, device="cpu")


def said() -> Console:
    return Console(file=StringIO(), width=500)


def evaluated(run: Path, data: str | Dataset | None = None) -> tuple[int, str, str]:
    """Return the number of images measured, the note in the result, and what was printed."""
    console = said()
    result = measure(run, ["none"], TargetOptions(data=data, device="cpu"), console=console)
    assert isinstance(console.file, StringIO)
    return result.records[0].n, json.loads(result.path.read_text())["note"], console.file.getvalue()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:
    """A folder of 60 photographs without test set, and a run on it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADVALIGN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        root = photos(tmp_path_factory.mktemp("mine") / "photos", range(60))
        return root, fit(f"folder:{root}", root.parent / "runs")


def copy_of(made: tuple[Path, Run], here: Path) -> Path:
    """Return a copy of the folder, whose path is not where the run was trained."""
    return Path(shutil.copytree(made[0], here / "photos"))


def test_a_run_keeps_what_it_was_trained_and_selected_on(made: tuple[Path, Run]):
    root, run = made
    data, kept = load(f"folder:{root}", image_size=8), read_trained_on(run.path)
    assert kept is not None
    assert set(kept.tolist()) == set(data.train.digests.tolist())  # with the validation images, held out of them
    assert not set(kept.tolist()) & set(data.test.digests.tolist())
    assert (run.path / FILE).stat().st_size < 1024 + 8 * len(kept)


def test_removing_and_adding_images_moves_none_to_the_other_side(made: tuple[Path, Run], tmp_path: Path):
    root, run = copy_of(made, tmp_path), made[1]
    whole = evaluated(run.path, f"folder:{root}")
    assert whole[:2] == (len(load(f"folder:{root}").test), load(f"folder:{root}").note)
    for number in (0, 7, 33):
        (root / ("cat", "dog")[number % 2] / f"{number}.png").unlink()
    photos(root, range(60, 90))
    (root / "cat" / "12.png").rename(root / "cat" / "zebra.png")
    after = load(f"folder:{root}", image_size=8)
    kept = read_trained_on(run.path)
    assert kept is not None
    assert not np.isin(after.test.digests, kept).any()
    n, note, _ = evaluated(run.path, f"folder:{root}")
    assert n == len(after.test)
    assert "left out" not in note


def test_a_folder_of_images_that_are_all_new_can_be_measured_whole(made: tuple[Path, Run], tmp_path: Path):
    run, new = made[1], photos(tmp_path / "new", range(200, 240))
    n, _, printed = evaluated(run.path, f"folder:{new}")
    assert n < 20
    assert f"measured: the {n} held-out images; --data folder-test:{new} takes all" in printed
    assert evaluated(run.path, f"folder-test:{new}")[0] == 40
    assert "folder-test" not in evaluated(run.path)[2]
    assert "folder-test" not in evaluated(run.path, f"folder:{made[0]}")[2]


def test_training_images_in_the_test_folder_are_left_out_and_it_is_said(made: tuple[Path, Run], tmp_path: Path):
    run = made[1]
    trained = load(f"folder:{made[0]}", image_size=8)
    first = next(n for n in range(60) if digest_of(n) in set(trained.train.digests.tolist()))
    photos(tmp_path / "new" / "test", range(100, 120))
    photo(first).save(tmp_path / "new" / "test" / "dog" / "other name.bmp")  # another format, perhaps another class
    n, note, printed = evaluated(run.path, f"folder:{tmp_path / 'new'}")
    assert n == 20
    expected = "1 of 21 test images are left out, copies of images that the model was trained or selected on"
    assert expected in note
    assert expected in printed
    target = load_target(run.path, TargetOptions(data=f"folder:{tmp_path / 'new'}", device="cpu"))  # as diagnoses do
    assert len(target.images) == 20
    assert expected in target.note


def test_copies_within_the_data_are_left_out_of_the_tests_of_any_model(tmp_path: Path):
    photos(tmp_path / "mine" / "train", range(20))
    photos(tmp_path / "mine" / "val", range(20, 30))
    photos(tmp_path / "mine" / "test", range(30, 40))
    for number, name in ((3, "cat"), (22, "dog"), (35, "dog")):
        photo(number).save(tmp_path / "mine" / "test" / name / "copy.png")
    run = fit(f"folder:{tmp_path / 'mine'}", tmp_path / "runs")
    assert evaluated(run.path)[0] == 11  # a copy within the test set stays
    (run.path / FILE).unlink()
    assert evaluated(run.path)[0] == 11


@pytest.mark.parametrize(("validation", "left"), [(4, 16), (None, 0)])
def test_a_users_validation_images_select_and_are_not_measured(validation: int | None, left: int, tmp_path: Path):
    root = photos(tmp_path / "mine" / "train", range(40)).parent
    photos(root / "val", range(40, 60))
    run = fit(f"folder:{root}", tmp_path / "runs", validation=validation)
    shutil.rmtree(root / "train")
    if left:
        assert evaluated(run.path)[0] == left
    else:
        with pytest.raises(UserError, match=r"nothing to measure: all 20 test images .* are copies of images that"):
            evaluated(run.path)


def test_models_of_a_transfer_matrix_share_the_images_that_none_has_seen(made: tuple[Path, Run], tmp_path: Path):
    root = photos(tmp_path / "other", range(30, 100))
    other = fit(f"folder:{root}", tmp_path / "runs")
    photos(tmp_path / "new" / "test", range(25, 35))
    photos(tmp_path / "new" / "test", range(95, 105))
    matrix = transfer_matrix(
        [made[1].path, other.path], "fgsm", TargetOptions(data=f"folder:{tmp_path / 'new'}", eps=0.1, device="cpu")
    )
    kept = [read_trained_on(run.path) for run in (made[1], other)]
    test = load(f"folder:{tmp_path / 'new'}", image_size=8).test
    unseen = ~np.isin(test.digests, np.concatenate([each for each in kept if each is not None]))
    assert matrix.n == unseen.sum() < 20


def test_an_official_test_set_stays_whole_and_it_is_said(tmp_path: Path):
    data = load("digits")
    mine = replace(data, name="mine", train=data.test.take(list(range(60))), test=data.train)
    run = fit(mine, tmp_path / "runs")
    n, note, printed = evaluated(run.path, "digits")
    assert n == 500
    expected = "60 of the 500 test images are copies of images that the model was trained or selected on; they count"
    assert expected in note
    assert expected in printed


def test_a_moved_folder_finds_its_run_and_guest_and_evaluation_asks_for_the_place(tmp_path: Path):
    root = photos(tmp_path / "photos", range(30))
    fit_again = partial(train, "at+kd", model=MODEL, recipe=RECIPE, runs=tmp_path / "runs", image_size=8, device="cpu")
    run = fit_again(data=f"folder:{root}")
    moved = root.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"photos, on which .* was trained, is not there: .* --data folder:PATH"):
        evaluated(run.path)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")}
    again = fit_again(data=f"folder:{moved}")
    assert again.path == run.path
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*.safetensors")} == stamps
    assert evaluated(run.path, f"folder:{moved}")[0] > 0


@pytest.mark.parametrize("known", [False, True])
def test_a_run_of_an_earlier_version_is_not_measured_on_images_held_out_by_another_rule(
    known: bool, made: tuple[Path, Run], tmp_path: Path
):
    path, (root, run) = tmp_path / "best.safetensors", made
    card = {"run": "0123456789", "data": f"folder:{root}"}
    data = load(f"folder:{root}", image_size=8)
    if known:
        earlier = {key: value for key, value in run.setting.items() if key != "class_names"}
        made_before = Run(tmp_path, earlier)
        made_before.write_card("finished", {}, {})
        assert leave_out_seen(data, path, card) is data
        data = load(f"folder:{photos(tmp_path / 'more', range(90))}", image_size=8)
    with pytest.raises(UserError, match=r"earlier version, which held out other test images .* --data folder-test"):
        leave_out_seen(data, path, card)
    tested = replace(data, held_out=False)
    measured = leave_out_seen(tested, path, card)
    assert measured.test is tested.test
    assert "which images the model was trained and selected on is not known" in measured.note
    assert "images" in load_weights(run.weights("best"))[1]


@pytest.mark.parametrize("other", [np.zeros((2, 2), np.uint64), np.zeros(3)])
def test_a_whole_file_that_holds_something_else_is_refused(other: np.ndarray, made: tuple[Path, Run], tmp_path: Path):
    run = Path(shutil.copytree(made[1].path, tmp_path / "run"))
    with (run / FILE).open("w+b") as file:
        np.save(file, other)
        seal_npy(file, Owner(made[1].id, ""))
    with pytest.raises(UserError, match=f"{FILE} holds something else than digests"):
        read_trained_on(run)


@pytest.mark.parametrize("at", [-3, 130])
def test_damaged_digests_are_refused(at: int, made: tuple[Path, Run], tmp_path: Path):
    run = Path(shutil.copytree(made[1].path, tmp_path / "run"))
    content = bytearray((run / FILE).read_bytes())
    content[at] ^= 1
    (run / FILE).write_bytes(content)
    with pytest.raises(UserError, match=f"{FILE} is damaged, its checksum does not fit: fetch the run's folder again"):
        measure(run, ["none"], TargetOptions(device="cpu"))


def test_weights_of_unknown_training_are_doubted_on_images_held_out_since(made: tuple[Path, Run], tmp_path: Path):
    root, run = made
    torch.save(models.build(MODEL, classes=2, channels=3).state_dict(), tmp_path / "theirs.pt")
    theirs = f"{MODEL}@{tmp_path / 'theirs.pt'}"
    doubt = "is not known: such images may be among those that are measured"
    assert f"which images the model was trained on {doubt}" in load_target(theirs, on(f"folder:{root}")).note
    photos(tmp_path / "own" / "train", range(20))
    photos(tmp_path / "own" / "test", range(20, 30))
    assert doubt not in load_target(theirs, on(f"folder:{tmp_path / 'own'}")).note
    tuned = fit(f"folder:{root}", tmp_path / "runs", init=theirs)
    expected = f"which images the weights were trained on from which the model has learned {doubt}"
    for path in (tuned.path, shutil.copytree(tuned.path, tmp_path / "moved")):
        assert expected in evaluated(path)[1]
        assert expected in evaluated(path)[2]
    again = fit(f"folder:{root}", tmp_path / "runs", init=tuned.path)  # what is not known is not forgotten
    assert expected in evaluated(again.path)[1]
    known = fit(f"folder:{root}", tmp_path / "runs", init=run.path)
    assert doubt not in evaluated(known.path)[1]


def test_a_validation_split_is_proposed_for_networks_trained_elsewhere(made: tuple[Path, Run], tmp_path: Path):
    photos(tmp_path / "new" / "train", range(100, 140))
    photos(tmp_path / "new" / "val", range(140, 150))
    proposed = f"--data folder-test:{tmp_path / 'new'}/val takes those of val/"
    assert proposed in evaluated(made[1].path, f"folder:{tmp_path / 'new'}")[2]
    assert evaluated(made[1].path, f"folder-test:{tmp_path / 'new' / 'val'}")[0] == 10
