"""Notices a loop that trains epoch after epoch, but has said only once that one begins."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sized
from typing import final

from torch import Tensor

from advalign.errors import require


@final
class EpochWatch:
    """Counts the images that are attacked since the last start of an epoch, against those that its loader has."""

    def __init__(self) -> None:
        self.images: int | None = None  # of the epoch, at most; None where that is not known
        self.seen = 0
        self.last: weakref.ref[Tensor] | None = None

    def __getstate__(self) -> dict[str, object]:
        """Leave out the last images: a copy has seen none."""
        return {**vars(self), "last": None}

    def start(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Begin to count; a list may be a part of an epoch, so only loaders say how long it is."""
        size = getattr(batches, "batch_size", None)
        self.images = len(batches) * size if isinstance(size, int) and isinstance(batches, Sized) else None
        self.seen, self.last = 0, None

    def count(self, x: Tensor, method: str) -> None:
        """Count images (N, C, H, W) that are attacked in training, once if they are attacked again.

        Raises:
            UserError: there are more than the epoch has.
        """
        if self.images is None or (self.last is not None and self.last() is x):
            return
        self.last = weakref.ref(x)
        require(
            self.seen < self.images,
            lambda: (
                f"{method} follows the epochs, and more images were attacked since the last objective.start_epoch than "
                f"the {self.images} of its loader: call it before each epoch, with the whole epoch's loader"
            ),
        )
        self.seen += len(x)
