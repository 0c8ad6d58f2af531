"""Consistency regularisation: the adversarial images of two augmentations of one image are answered alike."""

from __future__ import annotations

from typing import final

from advalign.errors import require
from advalign.objectives.contract import ADV, Outputs, Term, Terms
from advalign.objectives.distances import jensen_shannon
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels


@final
class Consistency(PlugIn):
    """weight JS(softmax(f(x1') / T), softmax(f(x2') / T)) of two augmentations x1, x2, both attacked. Tack et al. 2022.

    The base's loss is taken over both, one batch of 2 N images, as every other plug-in's is. JS(a, b) is the mean of
    KL(a || m) and KL(b || m), m = (a + b) / 2, averaged over the N pairs; gradient flows through both sides. The cost
    of a step is doubled.

    Args:
        weight: lambda.
        temperature: T, below 1 for sharper predictions.

    Raises:
        UserError: weight is negative, or the temperature is not above 0.
    """

    name = "consistency"
    needs = (ADV,)
    augmentations = 2

    def __init__(self, weight: float = 1.0, temperature: float = 0.5) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"consistency: weight={weight:g} must be at least 0")
        require(temperature > 0, lambda: f"consistency: temperature={temperature:g} must be above 0")
        self.weight, self.temperature = weight, temperature

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the divergence of the two augmentations' adversarial predictions."""
        log_p = (outs[ADV].logits / self.temperature).log_softmax(1)
        return {"consistency": Term(self.weight, jensen_shannon(*log_p.chunk(2)))}
