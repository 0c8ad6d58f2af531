"""A plug-in outside the package: the vanilla model's clean logits as a target for adversarial images.

advalign train 'trades+guided(weight=0.5)' --plugin my_plugin:Guided --data digits --model small-cnn --recipe digits
"""

import torch.nn.functional as F

from advalign.objectives.contract import ADV, Need, Term
from advalign.objectives.method import PlugIn


class Guided(PlugIn):
    """weight MSE(f(x'), g(x)), g the frozen vanilla model."""

    name = "guided"
    VANILLA = Need("vanilla", "clean")
    needs = (ADV, VANILLA)

    def __init__(self, weight: float = 1.0):
        super().__init__()
        self.weight = weight

    def terms(self, outs, y):
        gap = F.mse_loss(outs[ADV].logits, outs[self.VANILLA].logits)
        return {"guided": Term(self.weight, gap)}
