"""Annealing self-distillation rectification: labels softened by an average of the student itself."""

from __future__ import annotations

import math
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from advalign.errors import require
from advalign.objectives.contract import ADV, Need, Outputs, Terms
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels, Logits, Rows


@final
class ADR(PlugIn):
    """Labels become a q + (1 - a) 1_y, q = softmax(w(x) / T), a = clip(mix - (max q - q_y), 0, 1). Wu et al. 2024.

    w is an average of the student's weights and BatchNorm statistics over the steps, the network `ema`, in eval mode;
    the attack's cross entropy reads the soft labels too. Over the steps of the training, `mix` rises and T falls along
    half a cosine. The label stays the likeliest class. It adds no term: on `at` and `trades` the loss is the paper's,
    elsewhere the soft label enters the cross entropy of each term that supervises hard ones (in `mart` the first part
    of its boosted one). Costs one forward of w without gradient for the loss, one for an attack that reads labels.

    Args:
        mix_start: `mix` at the beginning, lambda_low in the paper.
        mix_end: `mix` at the end, lambda_high.
        temperature_start: T at the beginning, tau_high.
        temperature_end: T at the end, tau_low. The defaults are the authors' for CIFAR-10.
        decay: what a step leaves of the average.

    Raises:
        UserError: a mix is not in [0, 1], a temperature is not above 0, or decay is not in [0, 1).
    """

    name = "adr"
    replaces = frozenset({"targets", "average"})
    reads_labels = True
    EMA = Need("ema", "clean")
    needs = (ADV, EMA)
    attack_needs = (EMA,)
    progress: Tensor

    def __init__(
        self,
        mix_start: float = 0.7,
        mix_end: float = 0.95,
        temperature_start: float = 2.5,
        temperature_end: float = 2.0,
        decay: float = 0.995,
    ) -> None:
        super().__init__()
        for name, mix in (("mix_start", mix_start), ("mix_end", mix_end)):
            require(0 <= mix <= 1, lambda: f"adr: {name}={mix:g} must be in [0, 1]")
        for name, t in (("temperature_start", temperature_start), ("temperature_end", temperature_end)):
            require(t > 0, lambda: f"adr: {name}={t:g} must be above 0")
        require(0 <= decay < 1, lambda: f"adr: decay={decay:g} must be in [0, 1)")
        self.mix_start, self.mix_end = mix_start, mix_end
        self.temperature_start, self.temperature_end = temperature_start, temperature_end
        self.decay = decay
        self.register_buffer("progress", torch.zeros(()), persistent=False)

    def start_step(self, progress: float) -> None:
        """Note how far the annealing is."""
        self.progress.fill_(progress)

    def average_decay(self) -> float:
        """Return the decay, the same from the first step on."""
        return self.decay

    def soft_targets(self, outs: Outputs, y: Labels, rows: Rows | None) -> Logits:
        """Return the softened labels."""
        q = (outs[self.EMA].logits / self._annealed(self.temperature_start, self.temperature_end)).softmax(1)
        mix = self._annealed(self.mix_start, self.mix_end) - (q.amax(1) - q.gather(1, y[:, None]).squeeze(1))
        share = mix.clamp(0, 1)[:, None]
        return share * q + (1 - share) * F.one_hot(y, q.shape[1])

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return nothing: the terms of the base read the softened labels."""
        return {}

    def _annealed(self, start: float, end: float) -> Tensor:
        return end + 0.5 * (start - end) * (1 + torch.cos(math.pi * self.progress))
