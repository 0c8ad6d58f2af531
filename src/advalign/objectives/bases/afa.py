"""AFA: a linear layer on the robust features of `contrast`."""

from __future__ import annotations

import copy
from typing import final

import torch.nn.functional as F
from torch import Tensor, nn

from advalign.errors import require
from advalign.models import last_linear
from advalign.objectives.contract import ADV, CLEAN, Outputs, Term, Terms, TrainingAttack
from advalign.objectives.method import Base
from advalign.shapes import Labels


@final
class LinearAFA(Base):
    """CE(f(x), y), where only the last linear layer learns, on the features of `contrast`. Park et al. 2024.

    The second of AFA's two stages. The student is initialised from the guest `extractor`, of which all but the last
    linear layer stays frozen, in eval mode. That layer's weights are initialised to 0; its loss is convex, so the
    initial values do not matter.

    Args:
        temperature: of the contrast that trains the extractor, if none is provided.
        adversarial: train the layer on adversarial images instead.

    Raises:
        UserError: the temperature is not above 0.
    """

    name = "afa"
    init_from = "extractor"
    standalone_reason = "trains the last layer alone"

    def __init__(self, temperature: float = 0.1, adversarial: bool = False) -> None:
        super().__init__()
        require(temperature > 0, lambda: f"afa: temperature={temperature:g} must be above 0")
        self.temperature, self.adversarial = temperature, adversarial
        self.needs = (ADV,) if adversarial else (CLEAN,)
        self.supervises = ("adv",) if adversarial else ("clean",)
        self.training_attack = TrainingAttack(start="uniform") if adversarial else None

    def adapt(self, student: nn.Module) -> nn.Module:
        """Freeze all but the last linear layer, which is initialised anew."""
        return _LinearProbe(student)

    def restore(self, student: nn.Module) -> nn.Module:
        """Return a copy of the network inside, of which everything may learn again."""
        assert isinstance(student, _LinearProbe)
        return copy.deepcopy(student.net).requires_grad_(True)

    def terms(self, outs: Outputs, y: Labels) -> Terms:
        """Return the cross entropy."""
        view, need = ("adv", ADV) if self.adversarial else ("clean", CLEAN)
        return {view: Term(1.0, F.cross_entropy(outs[need].logits, y), supervises=view)}


class _LinearProbe(nn.Module):
    """A network that stays in eval mode, and of which only the last linear layer learns."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.requires_grad_(False)
        head = last_linear(net).requires_grad_(True)
        nn.init.zeros_(head.weight)
        if head.bias is not None:
            nn.init.zeros_(head.bias)
        self.eval()

    def train(self, mode: bool = True) -> _LinearProbe:
        return super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
