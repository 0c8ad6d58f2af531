"""Prior-guided regularisation: where the attack starts and where it ends, the logits are to be the same."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor

from advalign.errors import require
from advalign.objectives.contract import ADV, Need, Outputs, Term, Terms
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class PGI(PlugIn):
    """weight MSE(f(x'), f(start of the attack)), on logits, joined to any base. Jia et al. 2022.

    The mean is over N x K logits, and gradient flows through both passes. It keeps a network that meets one-step
    attacks from bending its loss between the two points. Costs one forward of the student.

    Args:
        weight: lambda.

    Raises:
        UserError: weight is negative.
    """

    name = "pgi"
    START = Need("student", "start")
    needs = (ADV, START)
    reads_start = True

    def __init__(self, weight: float = 10.0) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"pgi: weight={weight:g} must be at least 0")
        self.weight = weight
        self.start: Tensor | None = None

    def attacked_from(self, start: Tensor) -> None:
        """Keep the images where the attack started (N, C, H, W) for the update."""
        self.start = start

    def views(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add the images where the attack started.

        Raises:
            UserError: no attack has been made on these images.
        """
        start = self.start
        require(
            start is not None and start.shape == views["adv"].shape,
            "pgi reads where the attack started: make the adversarial images of the step by objective.perturb",
        )
        assert start is not None
        return views | {"start": start}

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the squared distance of the logits."""
        return {"pgi": Term(self.weight, F.mse_loss(outs[ADV].logits, outs[self.START].logits))}
