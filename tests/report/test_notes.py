"""What a result says of its images stands below the tables of its numbers, and images are read in the model's size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.report import report_on
from advalign.report.evaluation import write_evaluation
from advalign.training.recipes import Recipe
from advalign.training.train import train

SHADES = {"dark": 40, "grey": 120, "light": 200}


def paint(root: Path, names: list[str], each: int) -> str:
    draw = torch.Generator().manual_seed(each)
    for name in names:
        (root / name).mkdir(parents=True)
        for k in range(each):
            noise = torch.randint(0, 40, (9, 9), generator=draw, dtype=torch.uint8) + SHADES[name]
            Image.fromarray(noise.numpy()).save(root / name / f"{k}.png")
    return f"folder:{root}"


@pytest.mark.slow
def test_a_part_of_the_classes_is_said_wherever_the_numbers_stand(tmp_path: Path):
    photos, part = tmp_path / "photos", tmp_path / "part"
    recipe = Recipe(epochs=1, steps=1, batch_size=8, validation=6)
    paint(photos / "train", list(SHADES), 10)
    paint(photos / "test", list(SHADES), 2)
    run = train(
        "at", data=f"folder:{photos}", model="small-cnn(width=2)", recipe=recipe, image_size=8, device="cpu",
        runs=tmp_path / "runs",
    )  # fmt: skip
    paint(part / "test", ["dark", "light"], 3)
    measured = measure(run.path, ["fgsm"], TargetOptions(data=f"folder:{part}", device="cpu"))
    assert (measured.note, measured.records[0].n) == ("2 of 3 classes: dark, light", 6)
    write_evaluation(measured, str(run.path))
    assert measured.path.with_suffix(".md").read_text().endswith(" Images: 2 of 3 classes: dark, light.\n")
    (table,) = report_on([run.path], tmp_path / "report.html", maps=0)
    assert table.caption.endswith(" Images: 2 of 3 classes: dark, light.")
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy by class in numbers" in page
    assert "is not what was measured" not in page
