"""The network that attacks run on in an evaluation: fast, counted, and with the original for what is decisive."""

from __future__ import annotations

import logging
from typing import final

import torch
from torch import Tensor, nn

from advalign.models.adapted import Adapted, adapted
from advalign.models.fold import TRIED, Folded
from advalign.models.local import LocalNet, LocalRun
from advalign.shapes import ImageBatch, Labels

_log = logging.getLogger("advalign")


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
        self._local: LocalNet | None = None
        self._traced = False

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

    def begin_local(self, x: ImageBatch, side: int) -> LocalRun | None:
        """Map images (N, C, H, W) so that others, which differ from them in squares of that side, cost less.

        None where they would not: see `LocalNet`. It is for fp32 and float64 on the CPU, where arithmetic takes the
        time, and neither for a network that torch.fx cannot trace nor for one that draws random numbers.
        """
        if torch.is_autocast_enabled(x.device.type):
            return None
        if not self._traced:
            self._traced, self._local = True, self._trace(x)
        if self._local is None:
            return None
        try:
            run = self._local.begin(x.to(self.reads, copy=True), side)
            if run is None or self._agrees(run, x, side):
                return run
        except Exception as error:  # of a forward that does not run piece by piece as it does whole
            _log.debug("Square runs the network whole: %s: %s", type(error).__name__, error)
        self._local = None
        return None

    def propose(self, run: LocalRun, x: ImageBatch, top: Labels, left: Labels) -> Tensor:
        """Map images that differ from those of a run in the squares with these corners (N,)."""
        return self._counted(run.propose(x.to(self.reads, copy=True), top, left), len(x))

    def _trace(self, x: Tensor) -> LocalNet | None:
        twin = self.net.twin
        if twin is self.original or self.reads not in (torch.float32, torch.float64) or x.device.type != "cpu":
            return None
        assert isinstance(twin, Adapted)
        try:
            return LocalNet(twin.net, x[:1].to(self.reads))
        except Exception:  # a user's forward may raise anything on symbols; the whole network is right
            return None

    def _agrees(self, run: LocalRun, x: Tensor, side: int) -> bool:
        """Tell whether images give what the network gives, with a corner changed, and with that undone.

        These passes are no queries, and are not counted.
        """
        changed, zeros = x.clone(), torch.zeros(len(x), dtype=torch.int64, device="cpu")
        tried = torch.linspace(0, len(x) - 1, min(len(x), TRIED), device="cpu").long()
        changed[:, :, :side, :side] = 1 - changed[:, :, :side, :side]
        for images, top, left in ((changed, 0, 0), (x, x.shape[2] - side, x.shape[3] - side)):
            logits = run.propose(images.to(self.reads, copy=True), zeros + top, zeros + left)[tried]
            whole = self.net(images[tried])
            run.keep(zeros.bool())
            rounding = torch.finfo(whole.dtype).eps ** 0.5 * float(whole.abs().max())
            if not torch.allclose(logits, whole, rtol=0, atol=rounding):
                return False
        return True

    def _counted(self, logits: Tensor, n: int) -> Tensor:
        self.counts = [self.counts[0] + n, self.counts[1]]
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, grad: Tensor) -> None:
        self.counts = [self.counts[0], self.counts[1] + len(grad)]
