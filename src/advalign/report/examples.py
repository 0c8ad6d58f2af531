"""The adversarial images that `advalign evaluate --save-examples` saved, for the gallery."""

from __future__ import annotations

import io
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from advalign.errors import UserError, require
from advalign.runtime.files import read_content
from advalign.runtime.sealed import Owner, check_sealed, note_unsealed

COLUMNS = 8


def read_examples(file: Path, evaluation: Mapping[str, Any]) -> tuple[Tensor, Tensor, list[str], str]:
    """Return the first image of each class, its adversarial example by the strongest attack, captions, and the attack.

    A caption has a line each on the true class, the predicted one, and the attack's success. The images are the same
    for every model that was evaluated on equally many.

    Raises:
        UserError: the file is damaged, or holds no attack, or no predictions, as files of earlier versions do not.
    """
    accuracies = {record["attack"]: record["accuracy"] for record in evaluation["records"]}
    content = read_content(file)
    owner = Owner(file.with_suffix(".json").name, "evaluate again with --save-examples")
    if not check_sealed(content, file, owner):
        note_unsealed(file)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            names = [key.removeprefix("x_adv ") for key in arrays.files if key.startswith("x_adv ")]
            require(bool(names), lambda: f"{file} holds no adversarial images")
            attack = min(names, key=lambda name: accuracies[name])
            has_predictions = "class_names" in arrays.files
            require(
                has_predictions,
                lambda: f"{file} holds no predictions: advalign evaluate RUN --save-examples writes it anew",
            )
            labels, rows = np.unique(arrays["y"], return_index=True)
            labels, rows = labels[:COLUMNS], rows[:COLUMNS]
            x, x_adv, withstands, predicted = (
                arrays[key][rows] for key in ("x", f"x_adv {attack}", f"correct {attack}", f"predicted {attack}")
            )
            true, predicted_names = (arrays["class_names"][classes] for classes in (labels, predicted))
    except UserError:
        raise
    except (OSError, ValueError, LookupError, EOFError, BadZipFile, zlib.error) as error:  # of another shape, or cut
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{file} cannot be read ({line}): {owner.remedy}") from None
    right = [evaluation["outcomes"]["clean"][row] == "1" for row in rows]
    captions = [
        f"true {label}\npredicted {other}\n{'withstands' if after else 'fooled' if before else 'wrong before'}"
        for label, other, before, after in zip(true, predicted_names, right, withstands, strict=True)
    ]
    return torch.from_numpy(x), torch.from_numpy(x_adv), captions, attack
