"""Loss scaling, which fp16 needs: without it, most of its gradients are below all that it can hold."""

from __future__ import annotations

from typing import Any, final

import torch
from torch import Tensor


@final
class LossScale:
    """Multiplies the loss before the backward pass, and divides the gradients after it. Micikevicius et al. 2018.

    torch's `GradScaler`: where a gradient is not finite, the step is left out and the factor halved; after 2,000 steps
    in a row it is doubled. With a fused optimiser all of that happens on the device. An optimiser with momentum has its
    buffers from the start, since torch's fused SGD would leave them unwritten if its first step were left out.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.scaler = optimizer, torch.amp.GradScaler(device.type)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        """Steps that were left out since the last `take_skipped`."""
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss times the factor."""
        return self.scaler.scale(loss)

    def unscale(self) -> None:
        """Divide the gradients now, for what looks at them before the step."""
        self.scaler.unscale_(self.optimizer)

    def step(self) -> None:
        """Make the optimiser's step, or leave it out, and adapt the factor."""
        before = self._factor()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.skipped += self._factor() < before

    def take_skipped(self) -> int:
        """Return how many steps were left out since the last call."""
        skipped = int(self.skipped)
        self.skipped.zero_()
        return skipped

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {**self.scaler.state_dict(), "skipped": int(self.skipped)}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, TypeError, ValueError: it is none of a loss scale.
        """
        if not float(state["scale"]) > 0 or int(state["_growth_tracker"]) < 0:
            raise ValueError("its loss scale is none")
        self.skipped.fill_(state["skipped"])
        self.scaler.load_state_dict({name: value for name, value in state.items() if name != "skipped"})

    def _factor(self) -> Tensor:
        return self.scaler.scale(torch.ones((), device=self.skipped.device))
