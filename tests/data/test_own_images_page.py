"""The how-to page on own images: its commands run, and what it says of names and files is what the code knows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advalign.cli.commands import main
from advalign.data import NAMES
from advalign.data.image_files import SUFFIXES
from advalign.data.split_names import split_of

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "own-images.md").read_text()
QUICK = shlex.split("--model small-cnn --width 2 --epochs 1 --steps 1 --batch-size 16 --device cpu")


def test_training_says_what_it_has_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    for name in ("train/cat", "train/dog", "val/cat", "val/dog", "test/cat", "test/dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(draw.integers(0, 256, (9, 8, 3), np.uint8)).save(f"photos/{name}/{number}.png")
    main(["train", "natural", "--data", "folder:photos", "--image-size", "8", *QUICK])
    printed = "".join(capsys.readouterr().out.splitlines(keepends=True)[:5])
    for line in re.findall(r"^  (?:train|validation|test|used):.*$", PAGE, re.MULTILINE):
        pattern = re.sub(r"\d+", r"\\d+", re.escape(line)).replace(r",\ owl\ \d+", "")
        assert re.search(rf"^{pattern}$", printed, re.MULTILINE), pattern


def test_its_lists_are_the_codes():
    names, files = PAGE.partition("in any case:")[2], PAGE.partition("Read are ")[2]
    words = re.findall(r"`([a-zA-Z0-9_]+)`", names.partition("`trainers`")[0])
    assert len(words) == 13
    assert all(map(split_of, words))
    assert re.findall(r"`(\.[a-z]+)`", files.partition("hidden files")[0]) == list(SUFFIXES)
    assert all(f"`{name}`" in PAGE for name in NAMES if name.startswith("folder-"))
