"""Vanilla feature distillation: the vanilla model's features are what clean accuracy is made of."""

from __future__ import annotations

from typing import Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advalign.errors import require
from advalign.models import last_stage
from advalign.objectives.contract import ADV, CLEAN, Calibration, Need, Outputs, Term, Terms
from advalign.objectives.distances import DISTANCES
from advalign.objectives.method import Base, PlugIn
from advalign.runtime import ranks
from advalign.shapes import Labels


@final
class VFD(PlugIn):
    """weight mean(d(F(x'), F_van(x)) + d(F(x), F_van(x))). Cao et al. 2022 (VFD-Adv), eq. 5, joined to any base.

    F is the output of a layer, before pooling; d is the unsquared Euclidean distance of one image's flattened
    features; F_van, the frozen vanilla model's, only ever sees clean images. Both student terms carry gradient. The
    features come from the passes that the base runs anyway: no extra student forward (`at` alone has no clean pass
    of its own), one of the vanilla model. The other arguments cover what the paper leaves open.

    Example:
        >>> import advalign as aa
        >>> aa.TRADES() + aa.VFD(weight=0.1, layer=("layer3", "layer4"))
        Method(trades+vfd(weight=0.1, layer=("layer3", "layer4")))

    Args:
        weight: lambda of eq. 6. The paper scans 0 to 0.04: larger keeps more clean accuracy and less robustness.
        layer: a module's name, `penultimate` (after pooling) or `logits`, or several, whose terms are summed; the last
            stage (layer4 of resnet18, the paper's best) if None.
        distance: `euclidean`; `squared`, the sum over one image's features; `mean-squared`, the mean over all
            features; `whole-batch`, the norm of the batch's difference as one vector.
        eq6: add CE(f(x), y) to a base that has no clean cross entropy, as eq. 6 reads literally.
        init: the student's initial weights.

    Raises:
        UserError: weight is negative, or no layer or one twice; eq6 with a base that has clean cross entropy; when
            bound, a layer that does not exist.
    """

    name = "vfd"
    VANILLA = Need("vanilla", "clean")
    needs = (CLEAN, ADV, VANILLA)

    def __init__(
        self,
        weight: float = 0.02,
        layer: str | tuple[str, ...] | None = None,
        distance: Literal["euclidean", "squared", "mean-squared", "whole-batch"] = "euclidean",
        eq6: bool = False,
        init: Literal["random", "vanilla"] = "random",
    ) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"vfd: weight={weight:g} must be at least 0")
        several = isinstance(layer, tuple)
        require(
            not several or 0 < len(set(layer)) == len(layer), lambda: f"vfd: layer={layer} must name layers, each once"
        )
        self.weight, self.layer, self.distance, self.eq6, self.init = weight, layer, distance, eq6, init
        self.init_from = "vanilla" if init == "vanilla" else None

    def joins(self, base: Base) -> None:
        """Refuse `eq6` for a base that has clean cross entropy."""
        has_clean = self.eq6 and "clean" in base.supervises
        require(not has_clean, lambda: f"{base}+vfd: eq6 adds clean cross entropy, which {base} has: leave it out")

    def adapt(self, student: nn.Module) -> nn.Module:
        """Choose the layers."""
        layer = last_stage(student) if self.layer is None else self.layer
        self.aligned = layer if isinstance(layer, tuple) else (layer,)
        return student

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the layers that are aligned."""
        return self.aligned

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the distance of the student's clean and adversarial features to the vanilla model's clean ones."""
        terms = {"vfd": Term(self.weight, torch.stack([clean + adv for clean, adv in self._gaps(outs).values()]).sum())}
        if self.eq6:
            terms["vfd_clean"] = Term(1.0, F.cross_entropy(outs[CLEAN].logits, y), supervises="clean")
        return terms

    def calibrate(self, outs: Outputs, terms: Terms) -> Calibration:
        """Return, by layer, the two distances and how strongly each kind of term pulls at the features.

        A gradient is that of one image's loss with respect to its clean and adversarial features, its norm averaged
        over the batch. `ratio` is the norm for this term over that for the terms that supervise labels, if there are
        any; the method works between .05 and .5.
        """
        calibration = {}
        labels = [term for term in terms.values() if term.supervises]
        ties = [term for name, term in terms.items() if not term.supervises and name != "vfd"]
        for layer, (clean, adv) in self._gaps(outs).items():
            features = [outs[need].features[layer] for need in (CLEAN, ADV)]
            pull = {
                kind: _gradient([term.weight * term.value for term in group], features)
                for kind, group in (("labels", labels), ("ties", ties), ("vfd", [Term(self.weight, clean + adv)]))
            }
            calibration[layer] = {
                "distance_clean": ranks.batch_mean(clean.detach()),
                "distance_adv": ranks.batch_mean(adv.detach()),
                **{f"gradient_{kind}": norm for kind, norm in pull.items()},
                **({"ratio": pull["vfd"] / pull["labels"]} if labels else {}),
            }
        return calibration

    def _gaps(self, outs: Outputs) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each layer's mean distance, of clean and of adversarial features."""
        distance = DISTANCES[self.distance]
        gaps = {}
        for layer in self.aligned:
            target = outs[self.VANILLA].features[layer]
            clean, adv = (outs[need].features[layer] for need in (CLEAN, ADV))
            require(
                clean.shape == target.shape,
                lambda: (
                    f"vfd: layer {layer!r} has shape {tuple(clean.shape[1:])} in the student but "
                    f"{tuple(target.shape[1:])} in the vanilla model; they must have one architecture"
                ),
            )
            gaps[layer] = (distance(clean, target), distance(adv, target))
        return gaps


def _gradient(losses: list[Tensor], features: list[Tensor]) -> Tensor:
    """Return the mean over images of the norm of one image's gradient: N times that of a mean over the batch."""
    if not losses:
        return features[0].new_zeros(())
    grads = torch.autograd.grad(
        ranks.own_part(torch.stack(losses).sum()),
        features,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    norms = torch.cat([grad.flatten(1) for grad in grads], 1).norm(dim=1)
    return ranks.batch_mean(ranks.whole(len(norms)) * norms.mean())
