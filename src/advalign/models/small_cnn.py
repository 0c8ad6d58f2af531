"""A three-layer network for digits, demos and tests."""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn

from advalign.models.head import Head, check_sizes
from advalign.shapes import ImageBatch, Logits


@final
class SmallCNN(nn.Module):
    """Three 3x3 convolutions with BatchNorm and ReLU, the last two striding, then the average and one linear layer.

    Ours, not from a paper; torch's default initialisation.

    Raises:
        UserError: classes, channels or width too small.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(self, classes: int, channels: int = 3, width: int = 32) -> None:
        super().__init__()
        check_sizes(classes, channels, width)
        self.layer1 = _stage(channels, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.fc = Head(4 * width, classes)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) to logits (N, classes)."""
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def _stage(c_in: int, c_out: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())
