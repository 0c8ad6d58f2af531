"""The demo at toy size: what it writes, that it resumes, and that its numbers are those of the runs."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from advalign.runs import Run, read_records
from advalign.studies import demo as demo_module
from advalign.training.recipes import digits


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = replace(digits(), epochs=1, steps=1, subset=256, batch_size=128)
    monkeypatch.setattr(demo_module, "digits", lambda: recipe)
    monkeypatch.setattr(demo_module, "DEMO_METHODS", ("natural", "trades", "trades+vfd(weight=0.2)"))
    monkeypatch.setattr(demo_module, "_ROBUST", "trades+vfd(weight=0.2)")
    monkeypatch.setattr(demo_module, "MODEL", "small-cnn(width=4)")
    monkeypatch.setattr(demo_module, "DEMO_ATTACKS", ("fgsm", "mim(steps=2)"))


@pytest.mark.slow
def test_it_writes_the_page_the_pictures_and_the_records(tmp_path: Path):
    with (tmp_path / "out.txt").open("w") as printed:
        assert demo_module.demo(tmp_path, console=Console(file=printed, width=100))
    pictures = {path.name: io.BytesIO(path.read_bytes()) for path in tmp_path.glob("*.png")}
    assert pictures.keys() == {
        "trade-off.png", "after-training.png", "adversarial-examples.png", "training.png", "calibration-of-vfd.png",
    }  # fmt: skip
    assert (tmp_path / "runs" / "frontier" / "frontier.json").is_file()
    assert all(Image.open(picture).width > 500 for picture in pictures.values())
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 1  # the examples; what is drawn of lines is SVG
    assert page.count("<svg ") == 4
    records = read_records(tmp_path / "records.jsonl")
    assert {record.attack for record in records} == {
        "clean", "fgsm", "mim(steps=2)", "worst(fgsm, mim(steps=2))",
    }  # fmt: skip
    assert {record.threat for record in records} == {"Linf(0.2)"}
    for record in records:
        assert f"{100 * record.accuracy:.1f}" in page
    assert "worst case" in (tmp_path / "out.txt").read_text()
    assert not re.search(r"https?://", page)


@pytest.mark.slow
def test_a_second_call_trains_nothing(tmp_path: Path):
    quiet = Console(quiet=True)
    demo_module.demo(tmp_path, console=quiet)
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    demo_module.demo(tmp_path, console=quiet)
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.slow
def test_a_time_budget_stops_it_in_good_order(tmp_path: Path):
    quiet = Console(quiet=True)
    assert not demo_module.demo(tmp_path, time_budget=1e-6, console=quiet)
    assert not any(Run.read(card.parent).finished for card in tmp_path.rglob("run.json"))
    assert demo_module.demo(tmp_path, console=quiet)
