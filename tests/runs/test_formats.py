"""Checked JSON: flips, edits, newer versions and wrong types are refused; what an earlier version wrote is read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from advalign.errors import UserError
from advalign.runs.formats import (
    LogRow,
    RecordRow,
    ResultFile,
    RunFile,
    read_checked_json,
    read_checked_lines,
    with_checksum,
    write_checked_json,
    write_checked_lines,
)

ROOT = Path(__file__).parents[2]
RUN: dict[str, Any] = {
    "id": "0123456789",
    "status": "finished",
    "setting": {"method": "at", "data": "digits", "model": "small-cnn", "recipe": {"seed": 0}, "shape": [1, 8, 8]},
    "environment": {"torch": "2"},
}
ROW: dict[str, Any] = {"epoch": 1, "lr": 0.1, "loss": math.nan, "terms": {"adv": 1.5}}


def test_what_is_written_is_read(tmp_path: Path):
    write_checked_json(tmp_path / "run.json", RUN)
    assert read_checked_json(tmp_path / "run.json", RunFile, "remove it") == RUN
    write_checked_lines(tmp_path / "log.jsonl", [ROW, {**ROW, "loss": 0.5}])
    rows = read_checked_lines(tmp_path / "log.jsonl", LogRow, "remove it")
    assert [row["epoch"] for row in rows] == [1, 1]
    assert math.isnan(rows[0]["loss"])
    assert read_checked_lines(tmp_path / "none.jsonl", LogRow, "remove it") == []


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    file = tmp_path / "run.json"
    write_checked_json(file, RUN)
    content = file.read_bytes()
    for at in range(len(content)):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        try:
            read = read_checked_json(file, RunFile, "remove it")
        except UserError:
            continue
        assert read == RUN  # a flip between two kinds of white space changes nothing


@pytest.mark.parametrize("length", [0, 1, 10, 200])
def test_cut_files_are_refused(length: int, tmp_path: Path):
    write_checked_json(tmp_path / "run.json", RUN)
    (tmp_path / "run.json").write_bytes((tmp_path / "run.json").read_bytes()[:length])
    with pytest.raises(UserError, match=r"run\.json is damaged .*: remove it"):
        read_checked_json(tmp_path / "run.json", RunFile, "remove it")


WRONG: dict[str, tuple[Any, str]] = {
    "edited": ({**RUN, "status": "running"}, "was edited, its checksum does not fit"),
    "a list": ([1, 2], "is no JSON object"),
    "null": (None, "is no JSON object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_edited_files_are_refused(name: str, tmp_path: Path):
    content, words = WRONG[name]
    file = tmp_path / "run.json"
    write_checked_json(file, RUN)
    if isinstance(content, dict):
        content = {**json.loads(file.read_text()), **content}
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=words):
        read_checked_json(file, RunFile, "remove it")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"status": "done"}, "Invalid enum value 'done'"),
        ({"setting": {"method": 1, "data": "a", "model": "b"}}, r"Expected `str`, got `int` - at `\$.setting.method`"),
        ({"environment": []}, "Expected `object`, got `array`"),
        ({"extra": 1}, "unknown field `extra`"),
        ({"format": 2}, r"newer version of advalign \(format 2\): upgrade"),
        ({"format": "x"}, r"newer version of advalign \(format x\): upgrade"),
    ],
)
def test_files_without_a_checksum_are_checked_by_their_schema(change: dict[str, Any], words: str, tmp_path: Path):
    (tmp_path / "run.json").write_text(json.dumps({**RUN, **change}))
    with pytest.raises(UserError, match=words):
        read_checked_json(tmp_path / "run.json", RunFile, "remove it")


def test_a_result_must_agree_with_itself(tmp_path: Path):
    (file,) = (ROOT / "results" / "cifar10-small" / "trades" / "evaluations").glob("*.json")
    good = read_checked_json(file, ResultFile, "remove it")
    for change, words in (
        ({"outcomes": {**good["outcomes"], "fgsm": good["outcomes"]["fgsm"][1:]}}, "outcomes of fgsm are not 10000"),
        ({"outcomes": {**good["outcomes"], "fgsm": "2" + good["outcomes"]["fgsm"][1:]}}, "outcomes of fgsm are not"),
        ({"outcomes": {**good["outcomes"], "fgsm": "1" * 10000}}, "accuracy of fgsm is not that of its outcomes"),
        ({"records": []}, "no records"),
        ({"records": [{**good["records"][0], "accuracy": 2.0}]}, "accuracy 2.0 on 10000 images"),
        ({"records": [{**good["records"][0], "n": "many"}]}, "Expected `int`, got `str`"),
    ):
        write_checked_json(tmp_path / "a.json", {**good, **change})
        with pytest.raises(UserError, match=words):
            read_checked_json(tmp_path / "a.json", ResultFile, "remove it")


def test_the_committed_files_are_read():
    results = ROOT / "results"
    for file in results.rglob("run.json"):
        read_checked_json(file, RunFile, "fetch it again")
    for file in results.rglob("log.jsonl"):
        assert read_checked_lines(file, LogRow, "fetch it again")
    for file in results.rglob("records.jsonl"):
        assert read_checked_lines(file, RecordRow, "fetch it again")


def test_lines_that_are_lost_doubled_or_moved_are_noticed(tmp_path: Path):
    file = tmp_path / "log.jsonl"
    rows = [{"epoch": epoch, "lr": 0.1, "loss": 1.0, "terms": {}} for epoch in (1, 2, 3)]
    write_checked_lines(file, rows, "0123456789")
    assert [row["epoch"] for row in read_checked_lines(file, LogRow, "", "0123456789")] == [1, 2, 3]
    first, second, third = file.read_text().splitlines(keepends=True)
    for lines in ((first, second), (second, third), (first, third, second), (first, second, third, third), ()):
        file.write_text("".join(lines))
        with pytest.raises(UserError, match=r"lines are missing or another run's|it is empty"):
            read_checked_lines(file, LogRow, "", "0123456789")


def test_lines_of_earlier_versions_without_their_place_are_read(tmp_path: Path):
    file = tmp_path / "log.jsonl"
    row = {"epoch": 1, "lr": 0.1, "loss": 1.0, "terms": {}}
    file.write_text(json.dumps(with_checksum(row)) + "\n")
    assert read_checked_lines(file, LogRow, "", "0123456789") == [row]
