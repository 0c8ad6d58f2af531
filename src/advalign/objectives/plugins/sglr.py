"""Self-guided label refinement: each training image's label drifts to what the student has answered so far."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import final

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from advalign.errors import UserError, require
from advalign.models.taps import Tapped
from advalign.objectives.contract import ADV, CLEAN, Outputs, Terms
from advalign.objectives.method import PlugIn
from advalign.runtime import ranks
from advalign.shapes import Labels, Logits, Rows


@final
class SGLR(PlugIn):
    """Labels become s_i, at first 1_y; each visit moves s_i to m s_i + (1 - m) (.2 p_i + .8 p'_i). Li et al. 2024.

    From the share `begin` of the epochs on; before, nothing changes. p and p' are the student's probabilities of the
    clean and the adversarial image in this very step, in train mode and without gradient. One s_i is kept for each
    training image, whatever its augmentation, and is part of the state. The attack keeps the hard labels. On `at` this
    is the authors' code; the paper mixes a constant share of the label into the average, which the code lets decay.

    Args:
        begin: share of the epochs; the authors' epoch 90 of 200.
        momentum: m.

    Raises:
        UserError: begin is not in [0, 1], or momentum is not in [0, 1); in a step, no numbers of the images are given;
            at an epoch's start, several processes train that are no ranks of one run.
    """

    name = "sglr"
    replaces = frozenset({"targets"})
    reads_labels = True
    reads_rows = True
    needs = (ADV, CLEAN)
    CLEAN_SHARE = 0.2
    table: Tensor | None

    def __init__(self, begin: float = 0.45, momentum: float = 0.9) -> None:
        super().__init__()
        require(0 <= begin <= 1, lambda: f"sglr: begin={begin:g} must be in [0, 1], a share of the epochs")
        require(0 <= momentum < 1, lambda: f"sglr: momentum={momentum:g} must be in [0, 1)")
        self.begin, self.momentum = begin, momentum
        self.register_buffer("table", None, persistent=False)  # (images, K); rows of zeros: not visited yet
        self._set_begun(False)

    def get_extra_state(self) -> Tensor:
        """Return the table, which is empty before it has begun."""
        return torch.zeros(0) if self.table is None else self.table

    def set_extra_state(self, state: Tensor) -> None:
        """Restore it."""
        self.table = state.clone() if state.numel() else None
        self._set_begun(self.table is not None)

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Note whether it has begun, and make the table: within a recorded step it would be made anew each time."""
        strangers = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        require(
            ranks.are_joined() or not strangers,
            "sglr keeps a label for each training image, and several processes of a loop of your own would each keep "
            "their own: train by advalign.train, or in one",
        )
        self._set_begun(progress >= self.begin)
        if self.begun and self.table is None:
            for x, _ in islice(batches, 1):
                self._make_table(student(x).logits)

    def soft_targets(self, outs: Outputs, y: Labels, rows: Rows | None) -> Logits:
        """Return the refined labels, and in training keep them."""
        hard = F.one_hot(y, outs[ADV].logits.shape[1]).to(outs[ADV].logits.dtype)
        if not self.begun:
            return hard
        if rows is None:
            raise UserError("sglr keeps a label for each training image: give their numbers, rows=")
        if self.table is None:
            self._make_table(hard)
        assert self.table is not None
        self.table = self.table.to(hard)
        kept = self.table[rows]
        kept = torch.where(kept.sum(1, keepdim=True) > 0, kept, hard)
        p, p_adv = outs[CLEAN].logits.softmax(1), outs[ADV].logits.softmax(1)
        answer = self.CLEAN_SHARE * p + (1 - self.CLEAN_SHARE) * p_adv
        refined = self.momentum * kept + (1 - self.momentum) * answer
        if self.training:
            self.table.index_copy_(0, ranks.gather(rows), ranks.gather(refined.detach()))
        return refined

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return nothing: the terms of the base read the refined labels."""
        return {}

    def _make_table(self, like: Logits) -> None:
        require(self.images > 0, "sglr keeps a label for each training image: give their number, images=")
        self.table = like.new_zeros(self.images, like.shape[1])

    def _set_begun(self, begun: bool) -> None:
        """Read the clean pass only once it is needed: before, it would move BatchNorm's statistics."""
        self.begun, self.needs = begun, (ADV, CLEAN) if begun else (ADV,)
