"""Results of weights from elsewhere in a report: rows that say that nobody knows how the weights were trained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from advalign import models
from advalign.cli import commands as cli
from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.report import report_on
from advalign.report.commands import evaluate_line
from advalign.report.sources import find_sources
from advalign.report.trade_off import trade_off_figure
from advalign.runs import append_records
from advalign.runtime.files import write_json
from advalign.training.recipes import digits
from advalign.training.train import train

MODEL = "small-cnn(width=4)"


def weights(folder: Path, seed: int) -> Path:
    """Write a random network's weights, as somebody would who does not use advalign."""
    torch.manual_seed(seed)
    folder.mkdir()
    torch.save(models.build(MODEL, classes=10, channels=1).state_dict(), folder / "net.pt")
    return folder / "net.pt"


def measured(file: Path, mean: Sequence[float] = (), std: Sequence[float] = (), **options):
    target = TargetOptions(model=MODEL, data="digits", eps=0.2, n=100, mean=mean, std=std, device="cpu")
    return measure(file, ["fgsm"], target, **options)


@pytest.mark.slow
def test_weights_from_elsewhere_are_rows_beside_runs(tmp_path: Path):
    recipe = replace(digits(), epochs=1, steps=1, subset=256, batch_size=128)
    run = train("natural", data="digits", model=MODEL, recipe=recipe, runs=tmp_path / "runs", device="cpu")
    ours = measure(run.path, ["fgsm"], TargetOptions(eps=0.2, n=100, device="cpu"))
    theirs = measured(weights(tmp_path / "a", 0), save_examples=True)
    (table,) = report_on([tmp_path], tmp_path / "page.html", maps=0)
    cells = {row[0]: row[1:] for row in table.rows}
    assert list(cells) == ["natural", "net.pt, evaluated only"]
    for row, result in zip(table.rows, (ours, theirs), strict=True):
        shares = {record.attack: f"{100 * record.accuracy:.1f}" for record in result.records}
        assert row[1:3] == (shares["clean"], shares["fgsm"])
    assert cells["net.pt, evaluated only"][-3:] == ("unknown", "unknown", "net.pt")
    assert "unknown: weights without a training record" in table.caption
    drawn = (line.get_label() for line in trade_off_figure(find_sources([tmp_path]).records).axes[0].lines)
    assert {"natural", "net.pt, evaluated only"} <= set(drawn)  # that one is unknown tells nothing in a legend
    text = (tmp_path / "page.html").read_text()
    assert "Weights without a training record: 1, evaluated only" in text
    for heading in ("Accuracy by class", "Adversarial examples"):
        assert f"<h2>{heading}: digits, Linf(0.2), n = 100</h2>" in text
    assert "<h3>net.pt, evaluated only</h3>" in text


@pytest.mark.slow
def test_other_weights_of_the_same_name_are_other_rows(tmp_path: Path):
    files = [weights(tmp_path / name, seed) for seed, name in enumerate("ab")]
    results = [measured(files[0]), measured(files[1]), measured(files[0], mean=[0.3], std=[0.2])]
    (table,) = report_on([tmp_path], tmp_path / "page.html", maps=0)
    first, second = (json.loads(result.path.read_text())["weights"][:8] for result in results[:2])
    expected = {
        f"net.pt {first}, evaluated only": results[0],
        f"net.pt {second}, evaluated only": results[1],
        f"net.pt {first} with mean 0.3, evaluated only": results[2],
    }
    assert {row[0]: row[1] for row in table.rows} == {
        name: f"{100 * result.records[0].accuracy:.1f}" for name, result in expected.items()
    }


def test_a_result_may_be_named_and_is_read_once(tmp_path: Path):
    result = measured(weights(tmp_path / "a", 0), out=tmp_path / "results")
    again = Path("results") / ".." / "results" / result.path.name
    append_records(tmp_path / "collected" / "records.jsonl", result.records)
    found = find_sources([result.path, tmp_path, tmp_path / again])
    assert len(found.records) == len(result.records) == 3
    assert [len(results) for results in found.results.values()] == [1]
    (tmp_path / "results" / "12345678.json").write_text('{"records": ["somebody else\'s"]}')
    assert len(find_sources([tmp_path]).records) == 3
    with pytest.raises(UserError, match=r"no records below .*12345678\.json is damaged or not of advalign"):
        find_sources([tmp_path / "results" / "12345678.json"])
    write_json(result.path, {**json.loads(result.path.read_text()), "outcomes": {}})
    (line,) = find_sources([tmp_path]).unreadable
    assert f"{result.path} is damaged or was edited" in line


@pytest.mark.parametrize("kept", [True, False])
def test_the_line_measures_the_same_outcomes(kept: bool, tmp_path: Path):
    file = weights(tmp_path / "a", 0)
    result = measured(file, mean=[0.3], std=[0.2])
    ((evaluated,),) = find_sources([tmp_path]).results.values()
    assert evaluated.weights == file
    if not kept:
        line = evaluate_line(None, evaluated.content, {})
        assert f"# WEIGHTS: net.pt, the file with digest {evaluated.content['weights']}" in line
        assert "--weights WEIGHTS --model" in line
        return
    before = json.loads(result.path.read_text())
    result.path.unlink()
    cli.main(shlex.split(evaluate_line(file, evaluated.content, {}))[1:])
    assert json.loads(result.path.read_text())["outcomes"] == before["outcomes"]


def test_a_result_of_a_run_that_is_not_there_is_the_run_s(tmp_path: Path):
    recipe = replace(digits(), epochs=1, steps=1, subset=256, batch_size=128)
    run = train("natural", data="digits", model=MODEL, recipe=recipe, runs=tmp_path / "runs", device="cpu")
    result = measure(run.path, ["none"], TargetOptions(n=100, device="cpu"), out=tmp_path / "results")
    found = find_sources([tmp_path / "results"])
    assert found.records == result.records
    assert found.names == {run.id: f"natural, {run.id}"}
    ((evaluated,),) = found.results.values()
    assert f"RUN: the folder of run {run.id}" in evaluate_line(None, evaluated.content, {})
