"""Adversarial images that were saved measure as they did when they were made; rounded to 8 bits they need not fool."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from advalign import models
from advalign.data import Dataset, Images
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.results import Measurement
from advalign.runs.checkpoint import save_weights
from advalign.runtime.seeds import seeded

MODEL, CW = "small-cnn(width=2)", "cw(c=100, steps=60, lr=0.001)"
CARD = {"method": "at", "data": "mine", "model": MODEL, "classes": 3, "channels": 1, "shape": [1, 8, 8]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset, Measurement]:
    """A weights file, images that its network classifies as labelled, and their examples by C&W."""
    folder = tmp_path_factory.mktemp("saved")
    with seeded(3):
        net = models.build(MODEL, classes=3, channels=1).eval()
    pixels = torch.randint(0, 256, (60, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        net.get_parameter("fc.bias").sub_(net(pixels / 255).mean(0))  # every class is near
        images = Images(pixels, net(pixels / 255).argmax(1))
    data = Dataset("mine", images.take([]), images, ("a", "b", "c"))
    save_weights(folder / "net.safetensors", net, {**CARD, "norm": "linf", "eps": 8 / 255})
    which = TargetOptions(data=data, device="cpu")
    return folder, data, measure(folder / "net.safetensors", [CW], which, save_examples=True)


def clean(made: tuple[Path, Dataset, Measurement], x: np.ndarray, y: np.ndarray) -> str:
    folder, _, _ = made
    np.savez(folder / "adversarial.npz", x_test=x, y_test=y, class_names=np.array(["a", "b", "c"]))
    which = TargetOptions(data=f"npz:{folder / 'adversarial.npz'}", device="cpu")
    measured = measure(folder / "net.safetensors", ["none"], which)
    return "".join(str(int(right)) for right in measured.evaluation.correct["clean"])


def test_saved_examples_read_back_fool_as_they_did(made: tuple[Path, Dataset, Measurement]):
    _, _, measured = made
    stored = "".join(str(int(right)) for right in measured.evaluation.correct[CW])
    with np.load(measured.examples_path) as saved:
        x_adv, y = saved[f"x_adv {CW}"], saved["y"]
    assert "0" in stored
    assert clean(made, x_adv, y) == stored
    assert clean(made, x_adv.astype(np.float64), y) == stored
    assert clean(made, np.moveaxis(x_adv, 1, 3), y) == stored
    assert clean(made, np.rint(x_adv * 255).astype(np.uint8), y) != stored  # so the test can tell


def test_quantized_outcomes_are_those_of_the_rounded_images(made: tuple[Path, Dataset, Measurement]):
    folder, data, measured = made
    which = TargetOptions(data=data, device="cpu")
    rounded = measure(folder / "net.safetensors", [CW], which, quantize=8, save_examples=True)
    name = f"quantized({CW}, bits=8)"
    with np.load(measured.examples_path) as saved:
        x_adv, y = saved[f"x_adv {CW}"], saved["y"]
    expected = clean(made, np.rint(x_adv * 255).astype(np.uint8), y)
    assert "".join(str(int(right)) for right in rounded.evaluation.correct[name]) == expected
    assert [record.attack for record in rounded.records] == ["clean", name]
    assert rounded.path != measured.path
    assert (rounded.evaluation.unbounded, measured.evaluation.unbounded) == ({name}, {CW})
    assert name in rounded.distances
