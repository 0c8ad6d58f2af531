"""Which images a run was trained and selected on, kept in its folder as digests, so that none of them is measured."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from advalign.data import Extra, Images
from advalign.data.images import Digests
from advalign.errors import UserError, require
from advalign.runs.run import Run
from advalign.runs.sources import Weights
from advalign.runtime.files import written_atomically
from advalign.runtime.sealed import Owner, check_sealed, seal_npy

FILE = "trained_on.npy"
UNKNOWN = np.uint64(0)
"""Stands among the digests for images that are not known, those of weights without a training record."""
_REMEDY = "fetch the run's folder again, or train again"


def write_trained_on(run: Run, parts: Iterable[Images | Extra], others: Iterable[Weights] = ()) -> None:
    """Write the digests of a run's training and validation images, 8 bytes each; generated images are such as well.

    Args:
        others: weights that the run learns from, a start or a teacher; what they are known to have seen counts as seen,
            and that it is not known is kept as well.

    Raises:
        UserError: the file cannot be written, or one of the others' is damaged.
    """
    known = [read_trained_on(weights.path.resolve().parent) for weights in others]
    inherited = [np.array([UNKNOWN]) if digests is None else digests for digests in known]
    digests = np.unique(np.concatenate([*(images.digests for images in parts), *inherited]))
    try:
        with written_atomically(run.path / FILE) as draft:
            np.save(draft, digests)
            seal_npy(draft, Owner(run.id, _REMEDY))
    except OSError as error:
        raise UserError(f"cannot write {run.path / FILE}: {os.strerror(error.errno or 0)}") from None


def read_trained_on(folder: Path) -> Digests | None:
    """Read the digests (n,) of the images that the run in a folder was trained and selected on; None if not kept.

    Raises:
        UserError: the file is damaged, or of another run.
    """
    file = folder / FILE
    if not (file.is_file() and (folder / "run.json").is_file()):
        return None
    content = file.read_bytes()
    check_sealed(content, file, Owner(Run.read(folder).id, _REMEDY))
    try:
        digests = np.load(io.BytesIO(content))
    except ValueError:
        raise UserError(f"{file} is damaged: {_REMEDY}") from None
    require(
        digests.dtype == np.uint64 and digests.ndim == 1, lambda: f"{file} holds something else than digests: {_REMEDY}"
    )
    return digests
