"""The network that attacks run on in an evaluation: fast, counted, and with the original for what is decisive."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from advalign.models.adapted import Adapted, adapted
from advalign.models.fold import Folded
from advalign.shapes import ImageBatch


@final
class PassCounter(nn.Module):
    """The folded twin of a network, or the network itself where none works; counts images, forth and back."""

    original: Adapted

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        network = adapted(net)
        object.__setattr__(self, "original", network)  # past Module.__setattr__: its state is none of this module's
        self.net = Folded(network)
        self.counts = [0, 0]

    @property
    def reads(self) -> torch.dtype | None:
        """The floating-point type that the network reads, None if it has no parameters."""
        return self.original.reads

    def forward(self, x: ImageBatch) -> Tensor:
        """Map images (N, C, H, W) in [0, 1] to logits (N, K) by the twin."""
        return self._counted(self.net(x), len(x))

    def exact(self, x: ImageBatch) -> Tensor:
        """Map the images by the network itself."""
        return self._counted(self.original(x), len(x))

    def _counted(self, logits: Tensor, n: int) -> Tensor:
        self.counts = [self.counts[0] + n, self.counts[1]]
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, grad: Tensor) -> None:
        self.counts = [self.counts[0], self.counts[1] + len(grad)]
