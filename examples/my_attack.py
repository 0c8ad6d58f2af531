"""An attack outside the package: gradient ascent with steps that shrink from the radius to nothing.

advalign evaluate RUN --attacks 'my_attack:Shrinking(steps=20)'
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from advalign.attacks import Attack


@dataclass(frozen=True)
class Shrinking(Attack):
    """Gradient ascent on cross entropy from the clean image, with steps that shrink from the radius to nothing."""

    name: ClassVar[str] = "shrinking"
    transfers: ClassVar[bool] = True
    steps: int = 10

    def run(self, model, x, y):
        project, x_adv = self.threat.ball(x), x
        for step in range(self.steps):
            x_adv = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y, reduction="sum"), x_adv)
            size = self.threat.eps * (1 - step / self.steps)
            x_adv = project(x_adv.detach() + size * self.threat.steepest(grad))
        return x_adv
