"""The adversarial images that `advalign evaluate --save-examples` keeps, as a band of the gallery."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_COLUMNS = 8


def examples_of(file: Path, evaluation: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[str]]:
    """Return the first image of each class, what the attack that leaves least makes of it, and a caption.

    They are the same images for every model that was evaluated on as many.
    """
    accuracies = {record["attack"]: record["accuracy"] for record in evaluation["records"]}
    with np.load(file) as arrays:
        names = [key.removeprefix("x_adv ") for key in arrays.files if key.startswith("x_adv ")]
        attack = min(names, key=lambda name: accuracies[name])
        labels, rows = np.unique(arrays["y"], return_index=True)
        labels, rows = labels[:_COLUMNS], rows[:_COLUMNS]
        x, x_adv, withstands = (arrays[key][rows] for key in ("x", f"x_adv {attack}", f"correct {attack}"))
    right = [evaluation["outcomes"]["clean"][row] == "1" for row in rows]
    told = [
        "withstands" if after else "fooled" if before else "wrong before"
        for before, after in zip(right, withstands, strict=True)
    ]
    captions = [f"class {label}: {word}" for label, word in zip(labels, told, strict=True)]
    return torch.from_numpy(x), torch.from_numpy(x_adv), captions
