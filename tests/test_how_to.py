"""The how-to pages work as they stand: their files are written and their commands run, in the order of the page."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

PAGES = sorted((Path(__file__).parent.parent / "docs" / "how-to").glob("*.md"))
BLOCK = re.compile(r"^```(?P<language>\w+)\n(?P<content>.*?)^```$", re.MULTILINE | re.DOTALL)
MINUTES = ("which-numbers", "trouble", "cluster", "own-network")
SHORT = " --epochs 1 --steps 1 --batch-size 16 --validation 8 --subset 32"  # the last of two equal flags counts


def write_photos(root: Path) -> None:
    """Write `photos/{cat,dog,owl}`, 30 images each, which a small network can tell apart."""
    for label, name in enumerate(("cat", "dog", "owl")):
        (root / "photos" / name).mkdir(parents=True)
        for k in range(30):
            colour = [40, 40, 40]
            colour[label] = 120 + 4 * k
            Image.new("RGB", (20 + k % 3, 16), tuple(colour)).save(root / "photos" / name / f"{k}.png")


def shortened(script: str) -> str:
    """Let every training end after a step or two, and 100 images be 12; all else stays as the page shows it."""
    return re.sub(r"^(\s*advalign train .*)$", rf"\1{SHORT}", script, flags=re.MULTILINE).replace("-n 100", "-n 12")


def commands_of(page: Path) -> list[tuple[str, str]]:
    return [(match["language"], match["content"]) for match in BLOCK.finditer(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.weekly) if page.stem in MINUTES else page for page in PAGES],
    ids=lambda page: page.stem,
)
def test_the_page_works_as_it_stands(page: Path, tmp_path: Path):
    write_photos(tmp_path)
    environment = {
        **os.environ,
        "ADVALIGN_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    for language, content in commands_of(page):
        if language == "python" and (name := re.match(r"# (\w+\.py)\n", content)):
            (tmp_path / name[1]).write_text(content)
            continue
        if language not in ("python", "sh"):  # `bash` and others are not for this machine
            continue
        seeded = (
            f"import torch as _t\n_t.manual_seed(0)\n{content}"  # a guest that learns by chance is refused by chance
        )
        command = [sys.executable, "-c", seeded] if language == "python" else ["bash", "-euc", shortened(content)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{content}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
