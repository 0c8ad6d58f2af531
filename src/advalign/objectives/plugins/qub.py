"""QUB: a quadratic upper bound of the adversarial cross entropy."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from advalign.attacks.losses import kl_divergence
from advalign.errors import require
from advalign.objectives.contract import ADV, CLEAN, Outputs, Term, Terms
from advalign.objectives.method import Base, PlugIn
from advalign.shapes import Labels


@final
class QUB(PlugIn):
    """CE(f(x'), y) becomes CE(f(x), y) + (f(x') - f(x)).(p - 1_y) + 1/4 |f(x') - f(x)|^2, a bound. You, Lee 2025.

    The cross entropy is convex in the logits, and its second derivative is at most 1/2. The bound exceeds the cross
    entropy by 1/4 |f(x') - f(x)|^2 - KL(p || p'), whatever the label: this gap is the term that is added, so that it
    joins every base with a cross entropy of adversarial images. Gradient flows through all of it, p included: whether
    the authors detach p is not known to us.

    Args:
        decreasing: the gap's weight falls from 1 to 0 over the steps of the training, (1 - t) of the bound and t of the
            cross entropy, as the paper has for attacks of one step.
    """

    name = "qub"
    reads_labels = True
    progress: Tensor

    def __init__(self, decreasing: bool = False) -> None:
        super().__init__()
        self.decreasing = decreasing
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def joins(self, base: Base) -> None:
        """Refuse a base without a cross entropy of adversarial images."""
        bounded = "adv" in base.supervises and base.cross_entropy
        require(bounded, lambda: f"{base}+qub: it bounds the cross entropy of adversarial images, and {base} has none")

    @property
    def waits(self) -> bool:
        """Whether its weight falls."""
        return self.decreasing

    def start_step(self, progress: float) -> None:
        """Note how far the training is, if the weight falls."""
        self.progress.fill_(progress if self.decreasing else 0.0)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return what the bound exceeds the cross entropy by."""
        clean, adv = outs[CLEAN].logits, outs[ADV].logits
        gap = 0.25 * (adv - clean).square().sum(1) - kl_divergence(adv, clean)
        return {"qub": Term(1 - self.progress, gap.mean())}
