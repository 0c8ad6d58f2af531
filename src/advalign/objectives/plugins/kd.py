"""Knowledge distillation from a robust and a vanilla teacher: labels smoothed by two models."""

from __future__ import annotations

from typing import final

import torch.nn.functional as F
from torch import Tensor

from advalign.errors import require
from advalign.objectives.contract import ADV, Need, Outputs, Term, Terms
from advalign.objectives.method import PlugIn
from advalign.shapes import Labels, Logits


@final
class KD(PlugIn):
    """(1 - robust - vanilla) of the label terms + robust KD(f', t_rob') + vanilla KD(f', t_van'). Chen et al. 2021.

    Their eq. 4; f' is f(x'), and KD(s, t) = T^2 mean(- sum softmax(t / T) log softmax(s / T)). Self-distillation from a
    robust teacher, the base trained alone, and a vanilla one. Both are frozen and, as in the authors' code, see the
    student's adversarial images. The paper has it on AT; here the base's label terms are scaled and its other terms
    stay, which on AT is the paper's loss.

    Raises:
        UserError: a share is not in [0, 1] or both together exceed 1, or the temperature is not above 0.
    """

    name = "kd"
    replaces = frozenset({"labels"})
    ROBUST, VANILLA = Need("robust", "adv"), Need("vanilla", "adv")
    needs = (ADV, ROBUST, VANILLA)

    def __init__(self, robust: float = 0.6, vanilla: float = 0.1, temperature: float = 2.0) -> None:
        super().__init__()
        require(0 <= robust <= 1, lambda: f"kd: robust={robust:g} must be in [0, 1]")
        left = round(1 - robust, 12)  # 1 - .9 is a little less than .1
        require(
            0 <= vanilla <= left, lambda: f"kd: vanilla={vanilla:g} must be in [0, {left:g}], beside robust={robust:g}"
        )
        require(temperature > 0, lambda: f"kd: temperature={temperature:g} must be above 0")
        self.robust, self.vanilla, self.temperature = robust, vanilla, temperature
        self.drops_labels = vanilla >= left

    def reweigh(self, base: Terms) -> Terms:
        """Scale the terms that supervise hard labels."""
        kept = max(0.0, 1 - self.robust - self.vanilla)
        return {k: term._replace(weight=kept * term.weight) if term.supervises else term for k, term in base.items()}

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the soft cross entropies towards the two teachers."""
        student = outs[ADV].logits
        return {
            "kd_robust": Term(self.robust, self._soft(student, outs[self.ROBUST].logits)),
            "kd_vanilla": Term(self.vanilla, self._soft(student, outs[self.VANILLA].logits)),
        }

    def _soft(self, student: Logits, teacher: Logits) -> Tensor:
        t = self.temperature
        return t**2 * F.cross_entropy(student / t, (teacher / t).softmax(1))
