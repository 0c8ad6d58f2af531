"""AR-AT: adversarial features learn from clean ones, in one network with a BatchNorm for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advalign.errors import require
from advalign.models import Tapped, find_layer, last_linear, last_stage, named_layers
from advalign.models.split_norm import merged, split_norms, using_norms
from advalign.objectives.contract import ADV, CLEAN, Network, Outputs, Term, Terms, without_labels
from advalign.objectives.method import PlugIn
from advalign.runtime import ranks
from advalign.shapes import ImageBatch, Labels
from advalign.threats import Linf, Projection, Threat

MEASURED = 8  # batches, as in the authors' code


@final
class ARAT(PlugIn):
    """a CE(f_adv(x'), y) + (1 - a) CE(f_clean(x), y) + weight mean_l(1 - cos(h_l(z'_l), sg(z_l))). Waseda et al. 2025.

    It replaces the terms that supervise hard labels: on `at` this is the paper's loss; other terms of a base stay.
    f_adv and f_clean are one network with two sets of BatchNorm. z'_l and z_l are the outputs of a layer on x' and x,
    through ReLU and average pooling; h_l, the predictor, is learnt and not exported; no gradient flows to z_l. a is
    the accuracy of the clean path on the first 8 training batches of each epoch, and 0.5 before it is measured. The
    attack, and all evaluation, run through the adversarial norms, and the exported network has those alone.

    Args:
        weight: gamma, divided by the number of layers. The paper takes 30 for ResNet-18 and 100 for WRN-34-10.
        layer: a module's name, or several; if None, the BatchNorms of the last stage outside of shortcuts and
            what follows the stage (for ResNet-18 the paper's four).
        predictor: whether h_l is learnt; the identity if not (an ablation of the authors).
        symmetric: average with the loss that pulls clean features to adversarial ones (an ablation of the authors).
        noisy_clean: what the authors' code does and the paper does not say: the attack's start overwrites the images,
            so the clean pass sees uniform noise, and the ball lies around the noisy image, up to 2 eps from the image.

    Raises:
        UserError: weight is negative; when bound, a layer that does not exist or has no fixed number of channels, or
            a network without BatchNorm.
    """

    name = "ar-at"
    share: Tensor
    predictors: nn.ModuleList

    def __init__(
        self,
        weight: float = 30.0,
        layer: str | tuple[str, ...] | None = None,
        predictor: bool = True,
        symmetric: bool = False,
        noisy_clean: bool = False,
    ) -> None:
        super().__init__()
        require(weight >= 0, lambda: f"ar-at: weight={weight:g} must be at least 0")
        several = isinstance(layer, tuple)
        require(
            not several or 0 < len(set(layer)) == len(layer),
            lambda: f"ar-at: layer={layer} must name layers, each once",
        )
        self.weight, self.layer, self.predictor, self.symmetric = weight, layer, predictor, symmetric
        self.noisy_clean = noisy_clean
        self.replaces = frozenset({"labels", "norms", "threat"} if noisy_clean else {"labels", "norms"})
        self.predictors = nn.ModuleList()
        self.register_buffer("share", torch.tensor(0.5))

    def adapt(self, student: nn.Module) -> nn.Module:
        """Split every BatchNorm in two, and make a predictor for each aligned layer."""
        layer = _last_norms(student) if self.layer is None else self.layer
        self.aligned = layer if isinstance(layer, tuple) else (layer,)
        if self.predictor:
            self.predictors = nn.ModuleList(_predictor(_width(student, layer)) for layer in self.aligned)
        return split_norms(student)

    def restore(self, student: nn.Module) -> nn.Module:
        """Return a plain copy with the adversarial norms."""
        return merged(student, "adv")

    def layers(self, student: nn.Module) -> tuple[str, ...]:
        """Return the layers that are aligned."""
        return self.aligned

    def start_epoch(self, student: Tapped, batches: Iterable[tuple[Tensor, Tensor]], progress: float) -> None:
        """Measure a, the training accuracy of the clean path."""
        with using_norms(student, "clean"):
            right = [student(x).logits.argmax(1) == y for x, y in islice(batches, MEASURED)]
        require(bool(right), "ar-at measures its share on the epoch's batches, and there are none")
        self.share.copy_(ranks.gather(torch.cat(right).float()).mean())

    def attack_threat(self, student: Network, x: ImageBatch, threat: Threat) -> Threat:
        """Return the ball around the noisy images, if they are to be noisy."""
        if not self.noisy_clean:
            return threat
        require(isinstance(threat, Linf), lambda: f"ar-at: noisy_clean is defined for linf, not for {threat}")
        self.noise = ranks.draw(lambda batch: torch.empty_like(batch).uniform_(-threat.eps, threat.eps), x)
        return _Moved(threat.eps, self.noise)

    def views(self, views: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the views, the clean one with the attack's noise if it is to be noisy."""
        if not self.noisy_clean:
            return views
        require(hasattr(self, "noise"), "ar-at: noisy_clean takes its noise from the attack: call perturb first")
        return views | {"clean": views["clean"] + self.noise}

    def reweigh(self, base: Terms) -> Terms:
        """Drop the terms that supervise hard labels."""
        return without_labels(base)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the balanced cross entropies and the invariance of the features."""
        gaps = []
        for i, layer in enumerate(self.aligned):
            predict = self.predictors[i] if self.predictor else nn.Identity()
            adv, clean = (_pooled(outs[need].features[layer]) for need in (ADV, CLEAN))
            gap = 1 - F.cosine_similarity(predict(adv), clean.detach()).mean()
            if self.symmetric:
                gap = (gap + 1 - F.cosine_similarity(predict(clean), adv.detach()).mean()) / 2
            gaps.append(gap)
        return {
            "ar-at_adv": Term(self.share, F.cross_entropy(outs[ADV].logits, y), supervises="adv"),
            "ar-at_clean": Term(1 - self.share, F.cross_entropy(outs[CLEAN].logits, y), supervises="clean"),
            "ar-at_invariance": Term(self.weight, torch.stack(gaps).mean()),
        }


@dataclass(frozen=True, eq=False)
class _Moved(Linf):
    """The ball around the images and some noise."""

    noise: Tensor = field(default_factory=lambda: torch.zeros(()))

    def sample(self, x: Tensor) -> Tensor:
        return self.draw(x)

    def draw(self, x: Tensor) -> Tensor:
        return x + self.noise

    def ball(self, x: Tensor) -> Projection:
        low, high = (x + self.noise - self.eps).clamp(0, 1), (x + self.noise + self.eps).clamp(0, 1)
        return lambda x_adv: x_adv.clamp_(low, high)


def _predictor(width: int) -> nn.Module:
    hidden = max(width // 4, 1)
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width)
    )


def _last_norms(net: nn.Module) -> tuple[str, ...]:
    """Return the BatchNorms of the last stage and beyond that normalise no shortcut."""
    modules = named_layers(net)
    names = list(modules)
    names = names[names.index(last_stage(net)) :]
    return tuple(name for name in names if isinstance(modules[name], _BatchNorm) and "shortcut" not in name.split("."))


def _width(net: nn.Module, layer: str) -> int:
    """Return the number of channels that a layer gives."""
    if layer == "penultimate":
        return last_linear(net).in_features
    module = last_linear(net) if layer == "logits" else find_layer(net, layer)
    known = (getattr(module, name, None) for name in ("num_features", "out_channels", "out_features"))
    widths = [number for number in known if isinstance(number, int)]
    require(bool(widths), lambda: f"ar-at: layer={layer!r} must be a BatchNorm, a convolution or a linear layer")
    return widths[0]


def _pooled(features: Tensor) -> Tensor:
    """Return the features (N, D) after ReLU and average pooling."""
    return F.relu(features).flatten(2).mean(2) if features.ndim > 2 else F.relu(features)
