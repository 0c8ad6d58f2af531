"""Vanilla feature distillation: the vanilla model's features are what clean accuracy is made of."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from advalign.errors import require
from advalign.models import last_stage
from advalign.objectives.distances import euclidean
from advalign.objectives.parts import ADV, CLEAN, Need, Outs, PlugIn, Term, Terms


@final
class VFD(PlugIn):
    """weight mean(d(F(x'), F_van(x)) + d(F(x), F_van(x))). Cao et al. 2022 (VFD-Adv), eq. 5, joined to any base.

    F is the output of a layer, before pooling; d is the unsquared Euclidean distance of one image's flattened
    features; F_van, the frozen vanilla model's, only ever sees clean images. Both student terms carry gradient. The
    features come from the passes that the base runs anyway: no extra student forward (`at` alone has no clean pass
    of its own), one of the vanilla model.

    Args:
        weight: lambda of eq. 6. The paper scans 0 to 0.04: larger keeps more clean accuracy and less robustness.
        layer: a module's name, or `logits`; the last stage (layer4 of resnet18, the paper's best) if not given.

    Raises:
        UserError: weight is negative; when bound, a layer that does not exist.
    """

    name = "vfd"
    VANILLA = Need("vanilla", "clean")
    needs = (CLEAN, ADV, VANILLA)

    def __init__(self, weight: float = 0.02, layer: str | None = None) -> None:
        super().__init__()
        require(weight >= 0, f"vfd: weight={weight:g} must be at least 0")
        self.weight, self.layer = weight, layer

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the one layer that is aligned."""
        self.aligned = self.layer or last_stage(student)
        return (self.aligned,)

    def terms(self, outs: Outs, y: Tensor) -> Terms:
        """Return the distance of the student's clean and adversarial features to the vanilla model's clean ones."""
        target = outs[self.VANILLA].features[self.aligned]
        clean, adv = (outs[need].features[self.aligned] for need in (CLEAN, ADV))
        require(
            clean.shape == target.shape,
            f"vfd: layer {self.aligned!r} has shape {tuple(clean.shape[1:])} in the student but "
            f"{tuple(target.shape[1:])} in the vanilla model; they must have one architecture",
        )
        return {"vfd": Term(self.weight, euclidean(clean, target).mean() + euclidean(adv, target).mean())}
