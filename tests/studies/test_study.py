"""Studies at toy size on digits: what is done, what is not done twice, what stops, what fails, and what is shown."""

from __future__ import annotations

import io
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from rich.console import Console

from advalign.data import Images, load
from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.report import sweeps
from advalign.runs import Record, Run, read_records
from advalign.runtime.progress import format_duration
from advalign.studies import (
    SCALES,
    Cell,
    Column,
    Progress,
    Results,
    Study,
    plan_study,
    run_study,
    sweep_section,
    trade_off_section,
)
from advalign.studies.context import ExecutionContext
from advalign.studies.results import notes_on
from advalign.training.recipes import digits
from advalign.training.train import train

MODEL = "small-cnn(width=4)"
RECIPE = replace(digits(), epochs=1, steps=1, subset=256, batch_size=128)
COLUMNS = (
    Column(heading="clean"),
    Column(heading="PGD", attack="pgd(steps=2)"),
    Column(heading="few", attack="fgsm", n=100),
    Column(heading="black box", attack="fgsm", black_box=True),
)


def cell(method: str, **changes: object) -> Cell:
    return replace(Cell(method=method, data="digits", model=MODEL, recipe=RECIPE), **changes)  # pyright: ignore[reportArgumentType]


def study(*cells: Cell, columns: tuple[Column, ...] = COLUMNS, **changes: object) -> Study:
    surrogate = cell("natural", model="small-cnn(width=8)")
    made = Study(name="toy", title="Toy", cells=cells, columns=columns, surrogate=surrogate)
    return replace(made, **changes)  # pyright: ignore[reportArgumentType]


THREE = study(
    cell("natural"),
    cell("trades", curve="trades+vfd", at=0.0),
    cell("trades+vfd(weight=0.1)", curve="trades+vfd", at=0.1),
    first=("trades",),
    published={"trades": {"clean": 81.1}, "somebody's": {"PGD": 50.0}},
    source="a paper",
    figures=(trade_off_section, sweep_section("weight")),
)


def run(made: Study, folder: Path, **options: object) -> Results:
    return run_study(made, runs=folder / "runs", out=folder / "out", device="cpu", **options)  # pyright: ignore[reportArgumentType]


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*") if path.is_file()}


def numbers(records: list[Record]) -> set[tuple[object, ...]]:
    return {(record.method, record.attack, record.n, record.accuracy, record.seed) for record in records}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path, str]:
    """The study of three cells, carried out once; where it lies, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("study"), io.StringIO()
    return run(THREE, folder, console=Console(file=printed, width=200)), folder, printed.getvalue()


def test_every_cell_is_trained_and_measured(done: tuple[Results, Path, str]):
    results, folder, printed = done
    assert all(job.finished for job in results.jobs)
    assert [job.cell.method for job in results.jobs] == ["trades", "natural", "trades+vfd(weight=0.1)"]
    assert "cell 3 of 3: trades+vfd(weight=0.1) on digits, seed 0, about" in printed
    for job in results.jobs:
        found = job.records()
        assert {column.heading: record.n for column, record in found.items()} == {
            "clean": 500, "PGD": 500, "few": 100, "black box": 500,
        }  # fmt: skip
        assert {record.threat for record in found.values()} == {"Linf(0.2)"}
        assert {record.run for record in found.values()} == {job.run.id}
    written = {path.name for path in (folder / "out").iterdir()}
    assert written == {"study.json", "records.jsonl", "table.md", "report.html", "report-files"}
    assert {path.name for path in (folder / "out" / "report-files").iterdir()} == {
        f"{name}.{ending}"
        for name, endings in (("table", "md tex csv"), ("trade-off", "svg pdf png"), ("along-weight", "svg pdf png"))
        for ending in endings.split()
    }
    assert read_records(folder / "out" / "records.jsonl") == results.records()


def test_guests_and_surrogate_are_trained_once(done: tuple[Results, Path, str]):
    _, folder, _ = done
    runs = [Run.read(card.parent) for card in (folder / "runs").glob("*/run.json")]
    assert sorted(f"{run.setting['method']} {run.setting['model']}" for run in runs) == [
        f"natural {MODEL}", "natural small-cnn(width=8)", f"trades {MODEL}", f"trades+vfd(weight=0.1) {MODEL}",
    ]  # fmt: skip
    assert len(list((folder / "runs").rglob("transfer/*.safetensors"))) == 1


def test_a_second_call_does_nothing(done: tuple[Results, Path, str]):
    results, folder, _ = done
    before, out = stamps(folder), (folder / "out" / "records.jsonl").read_bytes()
    assert run(THREE, folder).records() == results.records()
    assert stamps(folder) == before
    assert (folder / "out" / "records.jsonl").read_bytes() == out


def test_a_new_column_alone_is_measured(done: tuple[Results, Path, str]):
    _, folder, _ = done
    before = stamps(folder)
    wider = replace(THREE, columns=(*COLUMNS, Column(heading="more", attack="pgd(steps=3)", n=50)))
    results = plan_study(wider, seeds=1, runs=folder / "runs", out=folder / "wider", context=ExecutionContext())
    assert [[column.heading for column in job.missing()] for job in results.jobs] == [["more"]] * 3
    assert "trades on digits, seed 0: trained, 4 of 5 columns measured" in results.overview()[1]
    assert results.overview()[0].startswith("surrogate: trained: ")
    assert stamps(folder) == before


def test_the_table_has_ours_the_published_and_the_difference(done: tuple[Results, Path, str]):
    results, folder, _ = done
    table = results.table()
    assert table.columns == ("method", "clean", "PGD", "few", "black box")
    accuracy = {
        (job.cell.row, column.heading): 100 * record.accuracy
        for job in results.jobs
        for column, record in job.records().items()
    }
    names = ["natural", "trades", "trades, paper", "trades, difference", "trades+vfd(weight=0.1)", "somebody's, paper"]
    assert [row[0] for row in table.rows] == names
    ours = {i: table.rows[i] for i in (0, 1, 4)}
    for row in ours.values():
        assert row[1:] == tuple(f"{accuracy[row[0], heading]:.1f}" for heading in table.columns[1:])
    assert table.rows[2][1:] == ("81.1", "", "", "")
    assert table.rows[3][1:] == (f"{accuracy['trades', 'clean'] - 81.1:+.1f}", "", "", "")
    assert table.rows[5][1:] == ("", "50.0", "", "")
    assert len(table.best) == 4
    for row, column in table.best:  # among the two that are attacked in training
        assert row in (1, 4)
        assert float(table.rows[row][column]) == max(float(ours[i][column]) for i in (1, 4))
    for row, column in table.faint:
        assert row in (1, 4)
        assert (row, column) not in table.best
    for words in ("test images: 500, 100 for few", "made on a natural small-cnn(width=8)", "a paper", "epochs: 1"):
        assert words in table.caption
    assert table.markdown() in (folder / "out" / "table.md").read_text()


def test_the_figures_data_are_the_records(done: tuple[Results, Path, str]):
    results, _, _ = done
    accuracy = {(r.method, r.attack): 100 * r.accuracy for r in results.records()}
    expected = [
        sweeps.CurvePoint(at, (accuracy[method, "clean"],), (accuracy[method, "pgd(steps=2)"],))
        for at, method in ((0.0, "trades"), (0.1, "trades+vfd(weight=0.1)"))
    ]
    assert results.progress.curves("PGD") == {"trades+vfd": expected}
    (axes,) = sweeps.trade_off_curves({"trades+vfd": expected}, "PGD").axes
    assert [list(point) for point in axes.lines[0].get_xydata()] == [[p.clean[0], p.robust[0]] for p in expected]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    assert axes.get_xlabel() == "clean accuracy, %"
    assert axes.get_ylabel() == "accuracy under PGD, %"


def test_bars_are_the_spread_over_seeds_and_names_stand_where_numbers_do_not():
    points = [
        sweeps.CurvePoint("layer1", (80.0, 82.0), (40.0, 44.0)),
        sweeps.CurvePoint("logits", (70.0, 70.0), (30.0, 30.0)),
    ]
    left, right = sweeps.sweep_curves({"vfd": points}, "layer", "PGD").axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["layer1", "logits"]
    assert list(left.lines[0].get_ydata()) == [81.0, 70.0]  # pyright: ignore[reportArgumentType]
    (bars,) = right.containers[0].lines[2]  # pyright: ignore[reportAttributeAccessIssue]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(2 * 2**0.5)
    assert left.get_xlabel() == right.get_xlabel() == "layer"


@pytest.mark.slow
def test_a_time_budget_stops_and_the_same_call_goes_on_to_the_same_records(
    done: tuple[Results, Path, str], tmp_path: Path
):
    printed = io.StringIO()
    results = run(THREE, tmp_path, time_budget=1e-6, console=Console(file=printed))
    assert "Stopped: the time budget is used up. The same command goes on." in printed.getvalue()
    assert results.records() == []
    assert "–" in (tmp_path / "out" / "table.md").read_text()
    budget, stops = 0.4, 0
    while not all(job.finished for job in results.jobs):
        results, stops, budget = run(THREE, tmp_path, time_budget=budget), stops + 1, 1.5 * budget
        assert results.failures == {}
    assert stops > 1
    assert numbers(results.records()) == numbers(done[0].records())


def test_a_cell_that_fails_is_shown_and_the_others_finish(tmp_path: Path):
    bad = cell("at", recipe=replace(RECIPE, lr=1e30), row="at, too fast")
    results = run(study(cell("natural"), bad, cell("alp"), columns=COLUMNS[:2]), tmp_path)
    assert [job.finished for job in results.jobs] == [True, False, True]
    assert results.table().rows[1][0] == "at, too fast (failed)"
    assert "failed: at, too fast: the loss became nan in epoch 1" in results.table().caption
    assert results.table().caption in (tmp_path / "out" / "table.md").read_text()
    assert results.table().rows[1][1:] == ("–", "–")
    again = plan_study(results.study, seeds=1, runs=tmp_path / "runs", out=tmp_path / "out", context=ExecutionContext())
    assert again.table() == results.table()
    assert "failed: the loss became nan" in "".join(again.overview())
    assert again.failures == {results.jobs[1].run.id: results.failures[results.jobs[1].run.id]}


def test_a_failed_surrogate_leaves_the_other_columns(tmp_path: Path):
    surrogate = cell("at", recipe=replace(RECIPE, lr=1e30))
    results = run(study(cell("natural"), surrogate=surrogate), tmp_path)
    assert results.table().rows[0][-1] == "–"
    assert [column.heading for column in results.jobs[0].missing()] == ["black box"]


def test_several_seeds(tmp_path: Path):
    results = run(study(cell("natural"), columns=COLUMNS[:1]), tmp_path, seeds=2)
    values = [100 * record.accuracy for record in results.records()]
    assert [record.seed for record in results.records()] == [0, 1]
    assert results.table().rows[0][1] == f"{mean(values):.1f} ± {stdev(values):.1f}"
    assert "seeds: 0, 1" in results.table().caption
    more = plan_study(
        study(cell("natural"), columns=COLUMNS[:1]),
        seeds=3,
        runs=tmp_path / "runs",
        out=tmp_path / "out",
        context=ExecutionContext(),
    )
    assert more.table().rows[0][1].endswith(" (2 of 3 seeds)")


@pytest.mark.slow
def test_features_are_mapped_and_kept(tmp_path: Path):
    from advalign.studies.figures import feature_section

    results = run(study(cell("natural"), columns=COLUMNS[:1], figures=(feature_section,)), tmp_path)
    kept = tmp_path / "out" / "features" / f"{results.jobs[0].run.id}.npz"
    stamp = kept.stat().st_mtime_ns
    section = feature_section(results.progress)
    assert section is not None
    clean, adversarial = section.figure.axes
    images = int((load("digits").test.labels < 5).sum())
    assert images < 2500
    for axes in (clean, adversarial):
        assert sum(len(np.asarray(each.get_offsets())) for each in axes.collections) == images
    assert kept.stat().st_mtime_ns == stamp


REFUSED = {
    "no cells": ({"cells": ()}, "no cells"),
    "one row twice": ({"cells": (cell("natural"), cell("natural"))}, "row 'natural, digits' is there twice"),
    "one heading twice": ({"columns": (COLUMNS[0], COLUMNS[0])}, "column 'clean' is there twice"),
    "no surrogate": ({"surrogate": None}, "black-box columns need a surrogate"),
    "surrogate of other data": ({"surrogate": cell("natural", data="cifar10")}, "must have its data"),
    "unknown row": ({"first": ("tardes",)}, "unknown row 'tardes'"),
    "data of nobody": (
        {"columns": (replace(COLUMNS[0], data="digist"),)},
        "unknown data of column 'clean' 'digist': did",
    ),
    "two data sets, one number": (
        {"cells": (cell("natural"), cell("natural", data="cifar10")), "surrogate": None, "columns": COLUMNS[:1]},
        "row 'natural' has the data cifar10 and digits: each column needs its data",
    ),
    "no seeds": ({"seeds": 0}, "seeds=0 must be at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_study_is_refused(name: str):
    changes, words = REFUSED[name]
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        replace(study(cell("natural")), **changes)  # pyright: ignore[reportArgumentType]


def test_what_cannot_work_is_refused_before_anything_is_trained(tmp_path: Path):
    with pytest.raises(UserError, match="unknown layer 'layre3': did you mean 'layer3'"):
        run(study(cell("natural"), cell('trades+vfd(layer="layre3")')), tmp_path)
    with pytest.raises(UserError, match="unknown executor 'rya'"):
        run(study(cell("natural")), tmp_path, executor="rya")
    with pytest.raises(UserError, match=r"gpus=0\.5 is for executor ray, and the executor is local"):
        run(study(cell("natural")), tmp_path, gpus=0.5)
    with pytest.raises(UserError, match="natural on digits, seed 0 is the surrogate itself, so no black box"):
        run(study(cell("natural"), surrogate=cell("natural")), tmp_path)
    with pytest.raises(UserError, match="seeds=0 must be at least 1"):
        run(study(cell("natural")), tmp_path, seeds=0)
    with pytest.raises(UserError, match="stops once it fools the surrogate"):
        Column(heading="AA", attack="autoattack", black_box=True)
    with pytest.raises(UserError, match="'bb' is a black box, and names no attack"):
        Column(heading="bb", black_box=True)
    with pytest.raises(UserError, match="n=0 must be at least 1"):
        Column(heading="none", n=0)
    with pytest.raises(UserError, match="unknown attack 'pdg'"):
        Column(heading="PGD", attack="pdg")
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_half_a_training_or_of_other_images_do_not_count(tmp_path: Path):
    """What `advalign evaluate` left in the run's folder is taken for the study's only where it is the same."""
    made = study(cell("natural", recipe=replace(RECIPE, epochs=2)), columns=COLUMNS[:1])
    (job,) = plan_study(made, seeds=1, runs=tmp_path / "runs", out=tmp_path / "out", context=ExecutionContext()).jobs
    train(
        "natural", data="digits", model=MODEL, recipe=job.cell.recipe, runs=tmp_path / "runs",
        sinks=lambda run: [lambda row: os.kill(os.getpid(), signal.SIGTERM)],
    )  # fmt: skip
    assert len(job.run.log) == 1
    half = measure(job.run.path, ["none"], TargetOptions(device="cpu")).records[0]
    results = run(made, tmp_path)
    (whole,) = results.records()
    assert (half.epochs, whole.epochs) == (1, 2)
    images = load("digits")
    noisy = replace(images, test=Images(255 - images.test.pixels, images.test.labels))
    other = measure(job.run.path, ["none"], TargetOptions(data=noisy, device="cpu")).records[0]
    assert other.accuracy != whole.accuracy
    assert run(made, tmp_path).records() == [whole]


def test_a_black_box_made_on_half_a_surrogate_does_not_count(done: tuple[Results, Path, str]):
    job = done[0].jobs[0]
    column = COLUMNS[3]
    record = job.records()[column]
    assert job._is_of(record, column)
    assert not job._is_of(replace(record, attack=f"{record.attack[:-1]} at epoch 1)"), column)


def test_a_damaged_run_fails_alone(tmp_path: Path):
    made = study(cell("natural"), cell("at"), columns=COLUMNS[:1])
    results = run(made, tmp_path)
    (results.jobs[0].run.path / "records.jsonl").write_text("{half a li")
    wider = replace(made, columns=COLUMNS[:2])
    results = run(wider, tmp_path)
    assert [job.finished for job in results.jobs] == [False, True]
    assert results.table().rows[0][0] == "natural (failed)"
    assert "records.jsonl" in results.table().caption
    assert results.table().rows[1][2] != "–"


def test_a_figure_that_cannot_be_drawn_leaves_the_rest(tmp_path: Path):
    def broken(progress: Progress) -> None:
        raise RuntimeError("no ink")

    results = run(study(cell("natural"), columns=COLUMNS[:1], figures=(broken,)), tmp_path)
    assert results.jobs[0].finished
    assert "A figure is missing: RuntimeError: no ink" in (tmp_path / "out" / "report.html").read_text()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "records.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"out holds another records\.jsonl: name another folder with --out"):
        run(study(cell("natural")), tmp_path)
    (tmp_path / "out" / "records.jsonl").unlink()
    run(study(cell("natural"), columns=COLUMNS[:1]), tmp_path)
    with pytest.raises(UserError, match="out is the folder of 'Toy'"):
        run(study(cell("natural"), columns=COLUMNS[:1], title="Another"), tmp_path)


@pytest.mark.slow
def test_what_another_process_trains_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("advalign.studies.execute.BUSY_SECONDS", 0.05)
    made = study(cell("natural"), cell("at"), columns=COLUMNS[:1])
    planned = plan_study(made, seeds=1, runs=tmp_path / "runs", out=tmp_path / "out", context=ExecutionContext())
    held = planned.jobs[0].run.path
    held.mkdir(parents=True)
    other, printed = FileLock(held / ".lock"), io.StringIO()
    other.acquire()
    stopped = run(made, tmp_path, time_budget=8, console=Console(file=printed, width=300))
    assert [job.finished for job in stopped.jobs] == [False, True]
    assert "later: " in printed.getvalue()
    assert "Stopped: the time budget is used up" in printed.getvalue()
    assert stopped.failures == {}
    other.release()
    assert all(job.finished for job in run(made, tmp_path).jobs)


@pytest.mark.slow
def test_waiting_for_a_guest_ends_with_the_time(tmp_path: Path):
    made = study(cell("at+vfd(weight=0.1)"), columns=COLUMNS[:1])
    planned = plan_study(made, seeds=1, runs=tmp_path / "runs", out=tmp_path / "out", context=ExecutionContext())
    held = planned.jobs[0].guests[0].run.path
    held.mkdir(parents=True)
    with FileLock(held / ".lock"):
        began = time.monotonic()
        printed = io.StringIO()
        run(made, tmp_path, time_budget=1, console=Console(file=printed, width=300))
    assert time.monotonic() - began < 20
    assert "waiting for the other process that trains" in printed.getvalue()
    assert "Stopped: the time budget is used up" in printed.getvalue()


def test_notes_are_of_the_columns_whose_heading_may_mislead_and_each_is_there_once():
    for scale in SCALES.values():
        columns = scale.columns()
        noted = {column.heading: column.attack for column in columns if column.note}
        assert noted == {
            "black-box C&W": "cw(steps=1000)", "C&W": "cw(steps=1000)", "CW-inf": 'pgd(steps=100, loss="margin")',
        }  # fmt: skip
        first, second = notes_on(columns)
        assert first.startswith("C&W is the L2 attack with c = 1 fixed")
        assert second.startswith("CW-inf is PGD on the margin loss, 100 steps")
    cw = next(column for column in SCALES["tiny"].columns() if column.heading == "black-box C&W")
    assert notes_on([cw, Column(heading="x", attack="cw(steps=5)")]) == [cw.note]
    (note,) = notes_on([Column(heading="x", attack="fast")])
    assert note.startswith("x: an estimate of autoattack")


def test_the_notes_stand_below_the_table(tmp_path: Path):
    columns = (*COLUMNS[:1], Column(heading="far", attack="fgsm", note="far is near"))
    made = study(cell("natural"), columns=columns, surrogate=None)
    results = plan_study(made, seeds=1, runs=tmp_path / "runs", out=tmp_path / "out", context=ExecutionContext())
    assert "; far is near; " in results.table().caption


def test_times_for_people():
    assert [format_duration(seconds) for seconds in (40, 700, 11_100)] == ["40s", "12m", "3h 05m"]


def test_the_worst_case_over_all_columns_is_measured_with_them(tmp_path: Path):
    """It is what every attack leaves of the same evaluation, image by image, and no attack of its own."""
    attacks = ("fgsm", "pgd(steps=2)")
    worst = f"worst({', '.join(attacks)})"
    columns = (*(Column(heading=name, attack=name) for name in attacks), Column(heading="worst case", attack=worst))
    made = study(cell("natural"), columns=columns, surrogate=None, first_seed=7)
    results = run(made, tmp_path)
    (job,) = results.jobs
    assert job.cell.recipe.seed == 7
    assert [record.attack for record in results.records()] == [*attacks, worst]
    (file,) = (job.run.path / "evaluations").glob("*.json")
    outcomes = json.loads(file.read_text())["outcomes"]
    assert set(outcomes) == {"clean", *attacks}
    left = [all(digit == "1" for digit in image) for image in zip(*outcomes.values(), strict=True)]
    assert results.records()[-1].accuracy == mean(left)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"subset": 5000}, "subset=5000 must be at most"),
        ({"validation": 2000}, "validation=2000 must be below"),
        ({"average": "method"}, "keeps no average"),
        ({"eps": 1.5}, "eps"),
        ({"attack": "atta", "augment": "cropshift"}, "goes through crop and flip"),
    ],
)
def test_a_cell_that_cannot_work_is_refused_after_one_like_it_that_can(
    tmp_path: Path, changes: dict[str, Any], reason: str
):
    """Cells alike in all that images and a trial step depend on share a trial; these are not alike."""
    cells = cell("rslad", row="fine"), cell("rslad", row="other", recipe=replace(RECIPE, **changes))
    with pytest.raises(UserError, match=reason):
        plan_study(study(*cells), seeds=1, runs=tmp_path, out=tmp_path / "out", context=ExecutionContext())


@pytest.mark.slow
def test_ten_thousand_cells_are_planned_in_seconds(tmp_path: Path):
    """Each with a run folder of its own; cells that differ in what no trial step sees share one."""
    cells = tuple(
        cell(method, row=f"{method} {k}", recipe=replace(RECIPE, weight_decay=1e-6 * k))
        for k in range(2000)
        for method in ("at", "trades", "trades+vfd", "mart", "hat")
    )
    began = time.process_time()
    planned = plan_study(study(*cells), seeds=1, runs=tmp_path, out=tmp_path / "out", context=ExecutionContext())
    assert time.process_time() - began < 60  # some 30 s on a busy core; memory is not measured
    assert len({job.run.path for job in planned.jobs}) == 10_000
    assert not any(job.finished for job in planned.jobs)
