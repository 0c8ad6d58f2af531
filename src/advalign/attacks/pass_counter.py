"""The network that attacks run on in an evaluation: fast, counted, and with the original for what is decisive."""

from __future__ import annotations

from typing import final

from torch import Tensor, nn

from advalign.models.fold import Folded
from advalign.shapes import ImageBatch


@final
class PassCounter(nn.Module):
    """The folded twin of a network, or the network itself where none can be made; counts images, forth and back."""

    original: nn.Module

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "original", net)  # past Module.__setattr__: its state is none of this module's
        try:
            self.net = Folded(net)
        except Exception:  # a network that cannot be copied
            self.net = net
        self.counts = [0, 0]

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
