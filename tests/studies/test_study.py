"""Studies at toy size on digits: what is done, what is not done twice, what stops, what fails, and what is shown."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from rich.console import Console

from advalign.data import load
from advalign.errors import UserError
from advalign.recipes import digits
from advalign.report import sweeps
from advalign.runs import Record, Run, read_records
from advalign.studies import Cell, Column, Results, Study, conduct, laid_out, sweep, trade_off
from advalign.studies.execute import Place, spelled

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
    figures=(trade_off, sweep("weight")),
)


def run(made: Study, folder: Path, **options: object) -> Results:
    return conduct(made, runs=folder / "runs", out=folder / "out", device="cpu", **options)  # pyright: ignore[reportArgumentType]


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
    assert written == {"records.jsonl", "table.md", "table.tex", "report.html", "trade-off.png", "along-weight.png"}
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
    results = laid_out(wider, seeds=1, runs=folder / "runs", out=folder / "wider", place=Place())
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
    ours, others = table.rows[:3], table.rows[3:]
    assert [row[0] for row in ours] == ["natural", "trades", "trades+vfd(weight=0.1)"]
    for row in ours:
        assert row[1:] == tuple(f"{accuracy[row[0], heading]:.1f}" for heading in table.columns[1:])
    assert others == (
        ("trades, paper", "81.1", "", "", ""),
        ("somebody's, paper", "", "50.0", "", ""),
        ("trades, difference", f"{accuracy['trades', 'clean'] - 81.1:+.1f}", "", "", ""),
    )
    for row, column in table.best:
        assert row < 3
        assert float(table.rows[row][column]) == max(float(each[column]) for each in ours)
    for told in ("test images: 500, 100 for few", "made on a natural small-cnn(width=8)", "a paper", "epochs: 1"):
        assert told in table.caption
    assert table.markdown() in (folder / "out" / "table.md").read_text()


def test_the_figures_data_are_the_records(done: tuple[Results, Path, str]):
    results, _, _ = done
    accuracy = {(r.method, r.attack): 100 * r.accuracy for r in results.records()}
    expected = [
        sweeps.Point(at, (accuracy[method, "clean"],), (accuracy[method, "pgd(steps=2)"],))
        for at, method in ((0.0, "trades"), (0.1, "trades+vfd(weight=0.1)"))
    ]
    assert results.curves("PGD") == {"trades+vfd": expected}
    (axes,) = sweeps.trade_off_curves({"trades+vfd": expected}, "PGD").axes
    assert [list(point) for point in axes.lines[0].get_xydata()] == [[p.clean[0], p.robust[0]] for p in expected]  # pyright: ignore[reportGeneralTypeIssues, reportOptionalIterable]
    assert axes.get_xlabel() == "clean accuracy, %"
    assert axes.get_ylabel() == "accuracy under PGD, %"


def test_bars_are_the_spread_over_seeds_and_names_stand_where_numbers_do_not():
    points = [sweeps.Point("layer1", (80.0, 82.0), (40.0, 44.0)), sweeps.Point("logits", (70.0, 70.0), (30.0, 30.0))]
    left, right = sweeps.sweep_curves({"vfd": points}, "layer", "PGD").axes
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["layer1", "logits"]
    assert list(left.lines[0].get_ydata()) == [81.0, 70.0]  # pyright: ignore[reportArgumentType]
    (bars,) = right.containers[0].lines[2]  # pyright: ignore[reportAttributeAccessIssue]
    low, high = bars.get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(2 * 2**0.5)
    assert left.get_xlabel() == right.get_xlabel() == "layer"


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
    assert stops > 1
    assert numbers(results.records()) == numbers(done[0].records())


def test_a_cell_that_fails_is_shown_and_the_others_finish(tmp_path: Path):
    bad = cell("at", recipe=replace(RECIPE, lr=1e30), row="at, too fast")
    results = run(study(cell("natural"), bad, cell("alp"), columns=COLUMNS[:2]), tmp_path)
    assert [job.finished for job in results.jobs] == [True, False, True]
    name = results.table().rows[1][0]
    assert name.startswith("at, too fast (failed: the loss became nan in epoch 1")
    assert name in (tmp_path / "out" / "table.md").read_text()
    assert results.table().rows[1][1:] == ("–", "–")


def test_a_failed_surrogate_leaves_the_other_columns(tmp_path: Path):
    surrogate = cell("at", recipe=replace(RECIPE, lr=1e30))
    results = run(study(cell("natural"), surrogate=surrogate), tmp_path)
    assert results.table().rows[0][-1] == "–"
    assert [column.heading for column in results.jobs[0].missing()] == ["black box"]


def test_several_seeds(tmp_path: Path):
    results = run(study(cell("natural"), columns=COLUMNS[:1]), tmp_path, seeds=2)
    values = [100 * record.accuracy for record in results.records()]
    assert [record.seed for record in results.records()] == [0, 1]
    assert results.table().rows[0][1].startswith(f"{mean(values):.1f} ± ")
    assert results.table().rows[0][1].endswith(" (2)")
    assert "seeds: 0, 1" in results.table().caption


def test_features_are_mapped_and_kept(tmp_path: Path):
    from advalign.studies.results import feature_plate

    results = run(study(cell("natural"), columns=COLUMNS[:1], figures=(feature_plate,)), tmp_path)
    kept = tmp_path / "out" / "features" / f"{results.jobs[0].run.id}.npz"
    stamp = kept.stat().st_mtime_ns
    plate = feature_plate(results)
    assert plate is not None
    clean, adversarial = plate.figure.axes
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
    with pytest.raises(UserError, match="n=0 must be at least 1"):
        Column(heading="none", n=0)
    with pytest.raises(UserError, match="unknown attack 'pdg'"):
        Column(heading="PGD", attack="pdg")
    assert list(tmp_path.iterdir()) == []


def test_times_for_people():
    assert [spelled(seconds) for seconds in (40, 700, 11_100)] == ["40s", "12m", "3h 05m"]
