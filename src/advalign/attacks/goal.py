"""What an attack wants of its images: to leave the class of their label, or to enter that of a target."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from advalign.attacks.classification import arrived_in, fooled_in
from advalign.shapes import ImageBatch, Labels, Logits, Mask, PerImage

Loss = Callable[[Tensor, Tensor], Tensor]  # (outputs, classes) -> (N,)


class Goal(NamedTuple):
    """The classes (N,) that images are to leave or, targeted, those that they are to enter."""

    classes: Labels
    targeted: bool = False

    def take(self, rows: Tensor) -> Goal:
        """Return the goal of some images, by row numbers or a mask."""
        return self._replace(classes=self.classes[rows])

    def loss(self, leaving: Loss) -> Loss:
        """Return the loss to maximise, from one that grows as images leave their classes."""

        def entering(logits: Logits, classes: Labels) -> PerImage:
            return -leaving(logits, classes)

        return entering if self.targeted else leaving

    def reached(self, network: Callable[[Tensor], Tensor], logits: Logits, x_adv: ImageBatch) -> Mask:
        """Tell which images are where they are wanted; where numbers are coarse, the network confirms it in fp32."""
        return (arrived_in if self.targeted else fooled_in)(network, logits, x_adv, self.classes)

    def reached_by(self, network: Callable[[Tensor], Tensor], x_adv: ImageBatch) -> Mask:
        """Tell which images are where they are wanted, by a pass in fp32."""
        with torch.no_grad(), torch.autocast(x_adv.device.type, enabled=False):
            return self.reached(network, network(x_adv), x_adv)
