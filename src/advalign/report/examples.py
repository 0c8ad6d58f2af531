"""The adversarial images that `advalign evaluate --save-examples` keeps, as a band of the gallery."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from advalign.errors import UserError, require

COLUMNS = 8


def read_examples(file: Path, evaluation: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[str], str]:
    """Return the first image of each class, what the attack that leaves least makes of it, a caption, and the attack.

    A caption has a line each on the true class, the predicted one, and whether the attack has changed it. They are the
    same images for every model that was evaluated on as many.

    Raises:
        UserError: the file is damaged, holds no attack, or no predictions, as those of earlier versions.
    """
    accuracies = {record["attack"]: record["accuracy"] for record in evaluation["records"]}
    with file.open("rb") as content:
        try:
            arrays = np.load(content)
        except (OSError, ValueError, BadZipFile) as error:
            raise UserError(f"cannot read {file}: {error}") from None
        names = [key.removeprefix("x_adv ") for key in arrays.files if key.startswith("x_adv ")]
        require(bool(names), lambda: f"{file} holds no adversarial images")
        attack = min(names, key=lambda name: accuracies[name])
        told = "class_names" in arrays.files
        require(told, lambda: f"{file} holds no predictions: advalign evaluate RUN --save-examples writes it anew")
        labels, rows = np.unique(arrays["y"], return_index=True)
        labels, rows = labels[:COLUMNS], rows[:COLUMNS]
        x, x_adv, withstands, predicted = (
            arrays[key][rows] for key in ("x", f"x_adv {attack}", f"correct {attack}", f"predicted {attack}")
        )
        true, says = (arrays["class_names"][classes] for classes in (labels, predicted))
    right = [evaluation["outcomes"]["clean"][row] == "1" for row in rows]
    captions = [
        f"true {label}\npredicted {other}\n{'withstands' if after else 'fooled' if before else 'wrong before'}"
        for label, other, before, after in zip(true, says, right, withstands, strict=True)
    ]
    return torch.from_numpy(x), torch.from_numpy(x_adv), captions, attack
