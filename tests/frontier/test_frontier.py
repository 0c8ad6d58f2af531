"""The verb from two networks on disk to a chosen one: what it may look at, what it leaves, how it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

import advalign as aa
from advalign.attacks import parse
from advalign.data import Dataset, Images, load, stratified_subset
from advalign.errors import UserError
from advalign.evaluation.diagnose_source import diagnose_source
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.target import SUBSET_SEED
from advalign.frontier import trace
from advalign.frontier.frontier import frontier
from advalign.frontier.members import held_out_images, load_members
from advalign.frontier.result import Frontier, read_frontier
from advalign.runs import Run
from advalign.training.planning import plan
from advalign.training.recipes import Recipe
from advalign.training.train import train

QUICK: dict[str, Any] = {"points": 4, "give": 5.0, "attacks": ["fgsm"], "curve_attack": "pgd(steps=3)", "held_out": 60}
N = TargetOptions(n=80, device="cpu")
RECIPE = Recipe(epochs=4, steps=1, eps=0.05, step_size=0.05, batch_size=32, subset=700, validation=100, lr=0.1)


@pytest.fixture(scope="module", autouse=True)
def less_effort() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "MARGIN", "min-margin(steps=10, targets=2)")
        patch.setattr(trace, "ROUNDS", 1)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frontier")
    run = train("trades+vfd", data="digits", model="small-cnn(width=4)", recipe=RECIPE, runs=folder, device="cpu")
    return run.path


@pytest.fixture(scope="module")
def traced(trained: Path) -> Frontier:
    return frontier(trained, **QUICK, target_options=N, out=trained.parent.parent / "out" / "first")


def options(dataset: Dataset) -> TargetOptions:
    return replace(N, data=dataset)


def test_the_curve_goes_from_the_vanilla_guest_to_the_robust_run(traced: Frontier, trained: Path):
    points = traced.test.points
    assert points[0].setting.values == {"weight": 0.0}
    assert points[-1].setting.values == {"weight": 1.0}
    guest = Run.read(trained).setting["guests"]["vanilla"]
    for name, point in ((guest, points[0]), (Run.read(trained).id, points[-1])):
        (folder,) = trained.parent.glob(f"*-{name}")
        clean = measure(folder, ["none"], replace(N, eps=0.05, norm="linf")).evaluation.correct["clean"]
        assert torch.equal(point.clean, clean)


def test_the_floor_lies_below_and_no_examples_are_left_out(traced: Frontier):
    for curve in (traced.held_out, traced.test):
        made_on = {str(point.setting) for point in traced.test.points}
        for point in curve.points:
            assert point.floor is not None
            assert not (point.floor & ~point.robust).any()
            assert torch.equal(point.robust, torch.stack(list(point.by_source.values())).all(0))
            assert {"clean", "robust network", "accurate network"} < set(point.by_source)
            assert made_on <= {name.partition(" on ")[2] for name in point.by_source}


def test_the_setting_is_chosen_on_images_that_neither_network_was_trained_on(trained: Path):
    members = load_members([trained], N, Console(quiet=True))
    images, test, where = held_out_images(members, 60, N, Console(quiet=True))
    assert "60 training images" in where
    data = load("digits")
    assert np.isin(images.digests, data.train.digests).all()
    assert not np.isin(images.digests, test.digests).any()
    for member in members:
        folder = member.path.parent

        setting = Run.read(folder).setting
        planned = plan(aa.parse(setting["method"]), data, setting["model"], RECIPE, runs=folder.parent, guests={})
        assert planned.run.id == Run.read(folder).id
        assert not np.isin(images.digests, planned.images[0].digests).any()


@pytest.mark.slow
def test_other_test_images_change_nothing_of_the_choice(traced: Frontier, trained: Path, tmp_path: Path):
    data = load("digits")
    other = replace(data, test=Images(data.test.pixels.flip(3), data.test.labels.roll(7)))
    vars(other)["digest"] = data.digest  # by which it is known as what the runs were trained on
    again = frontier(trained, **QUICK, target_options=options(other), out=tmp_path / "out", runs=tmp_path / "runs")
    assert [point.setting for point in again.test.points] == [point.setting for point in traced.test.points]
    assert again.chosen == traced.chosen
    assert again.test.points[0].count != traced.test.points[0].count


def test_the_chosen_network_is_a_run_like_any_other(traced: Frontier, trained: Path):
    run = chosen_run(traced)
    assert run.finished
    assert run.path.parent == trained.parent
    x = load("digits").test.floats()[:50]
    net = aa.load(run.path)
    torch.testing.assert_close(net(x), traced.network(x))
    setting = traced.test.points[traced.chosen].setting
    moved = trained.parent.parent / "moved"
    shutil.copytree(run.path, moved)  # alone, it needs neither of its members
    torch.testing.assert_close(aa.load(moved)(x), net(x))
    named = {record.attack: record for record in run.records}
    chosen = traced.test.points[traced.chosen]
    assert named["clean"].accuracy == pytest.approx(float(chosen.clean.double().mean()))
    (worst,) = [record for attack, record in named.items() if attack.startswith("worst(")]
    assert worst.accuracy == pytest.approx(float(chosen.robust.double().mean()))
    assert named["fgsm"].run == run.id
    assert str(setting) in named["fgsm"].method
    measured = measure(run.path, ["fgsm"], N)
    assert measured.evaluation.accuracies()["fgsm"] == pytest.approx(named["fgsm"].accuracy)


def chosen_run(traced: Frontier) -> Run:
    assert traced.run is not None
    return traced.run


@pytest.mark.slow
def test_it_is_diagnosed_with_its_members(traced: Frontier):
    names = {verdict.name for verdict in diagnose_source(chosen_run(traced).path, replace(N, n=20)).diagnosis.verdicts}
    assert {"members", "floor"} <= names


def test_a_second_call_makes_no_example_again_and_gives_the_same(traced: Frontier, trained: Path):
    files = {file: file.stat().st_mtime_ns for file in (traced.path / "examples").iterdir()}
    again = frontier(trained, **QUICK, target_options=N, out=traced.path)
    assert {file: file.stat().st_mtime_ns for file in (traced.path / "examples").iterdir()} == files
    assert again.chosen == traced.chosen
    for mine, theirs in zip(again.test.points, traced.test.points, strict=True):
        assert all(torch.equal(mine.by_source[name], theirs.by_source[name]) for name in theirs.by_source)


@pytest.mark.slow
def test_what_is_stopped_goes_on_to_the_same(
    traced: Frontier, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = 0

    def stop(file: Path, x_adv: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        write(file, x_adv)

    write = trace.write_examples
    monkeypatch.setattr(trace, "write_examples", stop)
    with pytest.raises(KeyboardInterrupt):
        frontier(trained, **QUICK, target_options=N, out=tmp_path / "out", runs=tmp_path / "runs")
    monkeypatch.undo()
    again = frontier(trained, **QUICK, target_options=N, out=tmp_path / "out", runs=tmp_path / "runs")
    assert [point.count for point in again.test.points] == [point.count for point in traced.test.points]


@pytest.mark.slow
def test_images_of_unknown_training_are_not_chosen_on(trained: Path, tmp_path: Path):
    shutil.copy(trained / "best.safetensors", tmp_path / "robust.safetensors")
    guest = next(trained.parent.glob("natural*")) / "best.safetensors"
    with pytest.raises(UserError, match=r"robust.safetensors was trained on is not known.*--held-out test:40"):
        frontier(tmp_path / "robust.safetensors", guest, **QUICK, target_options=N, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    apart = {**QUICK, "held_out": "test:30"}
    traced = frontier(tmp_path / "robust.safetensors", guest, **apart, target_options=N, out=tmp_path / "out",
                      runs=tmp_path / "runs")  # fmt: skip
    assert (traced.held_out.images, traced.test.images) == (30, 50)
    assert "30 test images that are set apart" in traced.about["images_held_out"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"method": "mixx"}, "mix"),
        ({"points": 2}, "points=2 must be in 3 to 101"),
        ({"give": -1.0}, "give=-1 must be in 0 to 100"),
        ({"held_out": 0}, "--held-out 0 must be at least 1"),
        ({"held_out": "test:80"}, "must be in 1 to 79"),
        ({"held_out": "test:x"}, "must be in 1 to 79"),
        ({"held_out": "digitz"}, "digitz"),
        ({"attacks": ["cw"]}, "cw"),
        ({"curve_attack": "pdg"}, "pgd"),
        ({"others": "self"}, "named twice"),
        ({"others": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    trained: Path, tmp_path: Path, arguments: dict[str, Any], words: str
):
    others = {"self": [trained], "nowhere": [tmp_path / "nowhere"]}.get(arguments.pop("others", ""), [])
    with pytest.raises(UserError, match=words):
        frontier(trained, *others, **QUICK | arguments, target_options=N, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_vanilla_guest_needs_the_accurate_network_named(trained: Path, tmp_path: Path):
    natural = next(trained.parent.glob("natural*"))
    with pytest.raises(UserError, match="without a vanilla network: name the accurate network"):
        frontier(natural, **QUICK, target_options=replace(N, eps=0.05, norm="linf"), out=tmp_path / "out")


@pytest.mark.slow
def test_damaged_examples_are_named(traced: Frontier, trained: Path, tmp_path: Path):
    shutil.copytree(traced.path, tmp_path / "out")
    file = sorted((tmp_path / "out" / "examples").glob("test-*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        frontier(trained, **QUICK, target_options=N, out=tmp_path / "out", runs=tmp_path / "runs")


@pytest.mark.slow
def test_a_hand_made_attack_on_the_chosen_network_stays_above_the_floor(traced: Frontier):
    """Other losses, starts and steps than any that the frontier used."""
    chosen = traced.test.points[traced.chosen]
    images = stratified_subset(load("digits").test, 80, SUBSET_SEED)
    x, y = images.floats(), images.labels
    net, withstood = traced.network, chosen.robust.clone()
    for spelled in ('pgd(loss="margin", steps=20, restarts=3)', "mim(steps=20)", "square(queries=100)"):
        attack = parse(spelled, threat=aa.Linf(0.05))
        withstood &= net(attack(net, x, y)).argmax(1) == y
    assert chosen.floor is not None
    assert not (chosen.floor & ~withstood).any()


@pytest.mark.slow
def test_networks_in_memory_have_the_curve_that_their_files_have(traced: Frontier, trained: Path, tmp_path: Path):
    h, g = (aa.load(path) for path in (trained, next(trained.parent.glob("natural*"))))
    members = load_members([trained], N, Console(quiet=True))
    held_out, test, _ = held_out_images(members, 60, N, Console(quiet=True))
    quick = {key: value for key, value in QUICK.items() if key != "held_out"}
    again = aa.frontier(
        h.train(), g, held_out=(held_out.floats(), held_out.labels), images=test, threat=aa.Linf(0.05), **quick,
        out=tmp_path / "out",
    )  # fmt: skip
    assert again.run is None
    assert again.chosen == traced.chosen
    assert [point.count for point in again.test.points] == [point.count for point in traced.test.points]
    x = test.floats()[:4]
    torch.testing.assert_close(again.network(x), traced.network(x))
    assert read_frontier(tmp_path / "out" / "frontier.json").content["robust"]["model"] == "SmallCNN"


def test_networks_need_images_and_nothing_of_files(trained: Path, tmp_path: Path):
    net = aa.load(trained)
    images = load("digits").test
    for sources, options, words in (
        ([net, trained], {}, "not both"),
        ([net, net], {}, "networks need images"),
        ([net], {"images": images, "held_out": images, "threat": aa.Linf(0.1)}, "give the accurate network"),
        ([trained], {"images": images}, "images and threat are for networks"),
    ):
        with pytest.raises(UserError, match=words):
            frontier(*sources, **options, out=tmp_path / "out")  # pyright: ignore[reportArgumentType]
