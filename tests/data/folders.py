"""Folders of small generated images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def write_photos(root: Path, each: int, classes: int = 3) -> Path:
    """Write class sub-folders of noise of different sizes; no two images are the same."""
    draw = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class_{label}"
        folder.mkdir(parents=True)
        for number in range(each):
            height, width = draw.integers(10, 20, 2)
            Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root
