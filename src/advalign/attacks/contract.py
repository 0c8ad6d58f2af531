"""What an attack is."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor, nn

from advalign.threats import Threat


class Attack(Protocol):
    """An attack maps images (N, C, H, W) in [0, 1] and labels (N,) to adversarial images."""

    name: ClassVar[str]
    bounded: ClassVar[bool]
    """Whether it stays inside its threat model; one that does not takes no part in a worst case."""

    @property
    def threat(self) -> Threat:
        """The threat model."""
        ...

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Attack; the model is left as it was found."""
        ...
