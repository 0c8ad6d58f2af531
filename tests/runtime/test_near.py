"""What is meant by a path that leads nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from advalign.runtime.near import near_path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("runs/natural", "runs/at-digits-0123456789", "runs/at+kd-digits-aaaaaaaaaa", "runs/trades-digits-1"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs" / "natural" / "best.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("runs/naturl", "runs/natural"),
        ("run/natural", "runs/natural"),
        ("rnus/naturla/best.safetensor", "runs/natural/best.safetensors"),
        ("runs/natural/best.pt", "runs/natural/best.safetensors"),
        ("runs/trades", "runs/trades-digits-1"),
        ("./runs/Natural", "runs/natural"),
        ("runs/../runs/naturl", "runs/../runs/natural"),
    ],
)
def test_one_path_is_near(typed: str, meant: str, here: Path):
    assert near_path(typed) == f"; did you mean {meant!r}?"
    assert near_path(here / typed) == f"; did you mean {str(here / meant)!r}?"


def test_names_that_go_on_are_all_meant(here: Path):
    (here / "runs" / "trades-digits-2").mkdir()
    assert near_path("runs/trades") == "; did you mean 'runs/trades-digits-1' or 'runs/trades-digits-2'?"


@pytest.mark.parametrize("typed", ["nowhere", "runs/xyz", "", ".", "runs/natural/best.safetensors/x", "a" * 300, "\0"])
def test_nothing_is_near(typed: str, here: Path):
    assert near_path(typed) == ""
