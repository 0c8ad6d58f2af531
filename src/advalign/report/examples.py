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
    """Return images, adversarial images under the attack that leaves least, and a caption for each.

    They are the first of each class that the model gets right before the attack.
    """
    accuracies = {record["attack"]: record["accuracy"] for record in evaluation["records"]}
    with np.load(file) as arrays:
        names = [key.removeprefix("x_adv ") for key in arrays.files if key.startswith("x_adv ")]
        attack = min(names, key=lambda name: accuracies[name])
        labels, right = arrays["y"], np.array(list(evaluation["outcomes"]["clean"])) == "1"
        rows = [int(np.flatnonzero(right & (labels == k))[0]) for k in np.unique(labels[right])[:_COLUMNS]]
        x, x_adv, withstands = (arrays[key][rows] for key in ("x", f"x_adv {attack}", f"correct {attack}"))
    told = ("withstands" if each else "fooled" for each in withstands)
    captions = [f"class {labels[row]}: {word}" for row, word in zip(rows, told, strict=True)]
    return torch.from_numpy(x), torch.from_numpy(x_adv), captions
