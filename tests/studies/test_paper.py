"""The papers' studies: what they declare, and that the published numbers are those of the source."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advalign.data import Dataset, Images
from advalign.objectives import parse
from advalign.studies import SCALES, STUDIES, Study, planning
from advalign.studies.job import Job
from advalign.studies.planning import plan_jobs
from advalign.training import planning as training_planning
from advalign.training.recipes import RECIPES

EVERY = [(scale, name) for scale in SCALES for name in STUDIES]


def made(scale: str, name: str) -> Study:
    return STUDIES[name](SCALES[scale])


def blank(name: str, n: int) -> Dataset:
    """Blank images of CIFAR's shape, which is also that of digits here."""
    classes = {"cifar10": 10, "cifar100": 100, "digits": 10}[name]
    images = Images(torch.zeros(n, 3, 32, 32, dtype=torch.uint8), torch.arange(n) % classes)
    return Dataset(name, images, images, tuple(map(str, range(classes))))


def jobs_of(study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    data = {name: blank(name, (study.cells[0].recipe.subset or 0) + 1200) for name in ("cifar10", "cifar100", "digits")}
    monkeypatch.setattr(planning, "dataset", lambda name, directory: data[name])
    return plan_jobs(study, 1, runs=folder, data_dir=None)


QUICK = [("paper", "table1"), ("paper", "table2")]  # the others take seconds each


@pytest.mark.parametrize(
    ("scale", "name"), [pair if pair in QUICK else pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY]
)
def test_every_study_plans_with_runs_of_its_own(scale: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    if scale != "tiny":  # a step of each large network takes minutes in all: see the slow test
        monkeypatch.setattr(training_planning, "try_step", lambda plan: None)
    jobs = jobs_of(made(scale, name), tmp_path, monkeypatch)
    assert len({each.run.path for each in jobs}) == len(jobs) == len(made(scale, name).cells)
    assert not any(each.finished for each in jobs)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.weekly
@pytest.mark.parametrize(("scale", "name"), [pair for pair in EVERY if pair[0] != "tiny"])
def test_every_method_of_the_large_scales_makes_a_step(
    scale: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    jobs_of(made(scale, name), tmp_path, monkeypatch)


def test_the_tiny_scale_is_what_its_line_spells():
    expected = replace(RECIPES["cpu"](), epochs=12, steps=5, validate_every=3)
    assert SCALES["tiny"].recipe == expected
    assert {cell.model for cell in made("tiny", "table1").cells} == {"small-cnn(width=16)"}
    surrogate = made("tiny", "table1").surrogate
    assert surrogate is not None
    assert (surrogate.method, surrogate.model) == ("natural", "small-cnn")
    assert {column.heading: column.n for column in made("tiny", "table1").columns} == {
        "black-box PGD": None, "black-box FGSM": None, "black-box C&W": 250, "PGD": None, "FGSM": None, "C&W": 250,
        "clean": None, "AA": 250, "CW-inf": None,
    }  # fmt: skip


def test_the_other_scales_are_the_presets():
    assert SCALES["paper"].recipe == RECIPES["common"]()
    assert SCALES["short"].recipe == replace(RECIPES["short"](), precision="bf16")


@pytest.mark.parametrize("name", ["table1", "table2", "vgg16"])
def test_a_table_has_four_bases_with_five_plug_ins_and_begins_with_the_question(name: str):
    rows = made("tiny", name).rows
    assert len(rows) == 21
    assert rows[:7] == ["natural", "alp", "alp+kd", "alp+bgat", "alp+lbgat", "alp+vfd", "trades"]
    assert rows[-1] == "hat+vfd"
    assert [cell.row for cell in made("tiny", name).in_order][:4] == ["natural", "trades", "trades+vfd", "alp"]


# Typed from the papers' tables a second time, so that a slip in one of both shows.
SPOTS = {
    "table1": [
        ("natural", "black-box PGD", 8.2), ("natural", "clean", 94.4), ("alp+vfd", "black-box C&W", 87.8),
        ("trades", "PGD", 53.5), ("trades", "C&W", 53.2), ("trades+vfd", "clean", 87.5), ("mart+vfd", "FGSM", 61.6),
        ("hat", "black-box FGSM", 81.9), ("hat+kd", "C&W", 43.1), ("hat+vfd", "PGD", 52.2),
    ],
    "table2": [
        ("natural", "black-box C&W", 69.9), ("alp+kd", "FGSM", 29.8), ("trades", "PGD", 25.4),
        ("trades+vfd", "clean", 67.3), ("mart+kd", "black-box PGD", 46.7), ("mart+kd", "clean", 56.6),
        ("hat+lbgat", "C&W", 18.7), ("hat+vfd", "clean", 64.5),
    ],
    "arat": [
        ("at", "CIFAR-10 AA", 42.42), ("at+ar-at", "CIFAR-10 clean", 87.82), ("at+ar-at, SWA", "CIFAR-100 AA", 24.36),
        ("ARREST", "CIFAR-10 clean", 86.63), ("at+ar-at(weight=100), SWA, large", "CIFAR-10 AA", 54.03),
        ("trades(beta=0)+lbgat, large", "CIFAR-100 clean", 68.17), ("mart, large", "CIFAR-100 AA", 24.89),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", SPOTS)
def test_published_numbers_are_the_source_s(name: str):
    study = made("paper", name)
    for row, heading, number in SPOTS[name]:
        assert study.published[row][heading] == number
    headings = {column.heading for column in study.columns}
    for row, numbers in study.published.items():
        assert row in study.rows or row.startswith("ARREST")
        assert numbers.keys() <= headings
    assert {row for row in study.rows if row not in study.published} == set()
    if name != "arat":
        assert all(len(numbers) == 7 for numbers in study.published.values())


def test_the_paper_s_averages_follow_from_its_numbers():
    """What the paper says of its tables: +4.3 over six columns for TRADES, of which 2.2 in the white-box ones."""
    table = made("paper", "table1").published
    attacked = [heading for heading in table["trades"] if heading != "clean"]
    gains = [table["trades+vfd"][heading] - table["trades"][heading] for heading in attacked]
    assert sum(gains) / 6 == pytest.approx(4.27, abs=0.005)
    assert sum(gains[3:]) / 3 == pytest.approx(2.20, abs=0.005)


def test_the_sweeps_run_through_their_argument():
    assert [cell.at for cell in made("paper", "figure4a").cells] == ["layer1", "layer2", "layer3", "layer4", "logits"]
    weights = {cell.at: cell.method for cell in made("paper", "figure4b").cells}
    assert list(weights) == [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04]
    assert weights[0] == "trades"
    assert weights[0.02] == "trades+vfd"  # the default: one run with Table 1's
    betas = [parse(cell.method).base for cell in made("paper", "figure2").cells]
    assert [vars(base)["beta"] for base in betas] == [1, 2, 3, 4, 5, 6] * 5


@pytest.mark.slow
def test_a_run_is_that_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from advalign.cli import commands as cli

    jobs = jobs_of(made("tiny", "table1"), tmp_path, monkeypatch)
    data = planning.dataset("cifar10", None)
    monkeypatch.setattr("advalign.training.train.load", lambda *names, **options: data)
    cli.main(
        ["train", "trades+vfd", "--data", "cifar10", "--model", "small-cnn(width=16)", "--recipe", "cpu", "--epochs",
         "12", "--steps", "5", "--validate-every", "3", "--runs", str(tmp_path), "--time-budget", "0.01"]
    )  # fmt: skip
    (vanilla,) = tmp_path.iterdir()
    expected = {each.cell.method: each for each in jobs}
    assert vanilla == expected["natural"].run.path
    assert [guest.run.path for guest in expected["trades+vfd"].guests] == [vanilla]


def test_what_needs_a_warm_up_has_one_where_the_learning_rate_begins_at_its_top():
    for scale, epochs in (("paper", 1), ("short", 0), ("tiny", 0)):
        for name in ("table1", "table2", "vgg16", "figure2", "figure3", "arat"):
            for cell in made(scale, name).cells:
                needs = any(part in cell.method for part in ("lbgat", "ar-at"))
                assert cell.recipe.warmup == (epochs if needs else 0), (scale, name, cell.row)
    averaged = {cell.recipe.average_start for cell in made("paper", "arat").cells if cell.recipe.average == "swa"}
    assert averaged == {RECIPES["common"]().milestones[0]}
