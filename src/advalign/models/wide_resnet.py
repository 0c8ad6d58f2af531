"""WRN-28-10 and WRN-34-10: pre-activation residual networks, wide instead of deep."""

from __future__ import annotations

from math import sqrt
from typing import ClassVar, final

import torch.nn.functional as F
from torch import nn

from advalign.errors import require
from advalign.models.head import Head, check_sizes
from advalign.models.preact_resnet import preact_stage
from advalign.shapes import ImageBatch, Logits


@final
class WideResNet(nn.Module):
    """Wide residual network. Zagoruyko and Komodakis 2016; WRN-34-10 is TRADES's large network (Zhang et al. 2019).

    As in the TRADES code, initialisation included (normal, variance 2 / fan-out; a zero bias in `fc`), but the stages
    are called layer1 to layer3 as in our other networks, dropout is left out (its rate is 0 there), and so is
    `sub_block1`, which that code builds and never runs. A stage's output is taken before the next BatchNorm and ReLU.
    We pool over whatever area is left, so that any image size works.

    Raises:
        UserError: classes, channels or width too small.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(self, depth: int, classes: int, channels: int = 3, width: int = 160) -> None:
        super().__init__()
        check_sizes(classes, channels, width)
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer1 = preact_stage(16, width, 1, blocks=blocks)
        self.layer2 = preact_stage(width, 2 * width, 2, blocks=blocks)
        self.layer3 = preact_stage(2 * width, 4 * width, 2, blocks=blocks)
        self.bn = nn.BatchNorm2d(4 * width)
        self.fc = Head(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0, sqrt(2 / fan_out))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) to logits (N, classes)."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(out)).mean((2, 3)))


def wide_resnet(classes: int, channels: int = 3, depth: int = 28, width: int = 160) -> WideResNet:
    """Build a wide residual network of any depth, 6 n + 4; `width` is the channels of its first stage.

    Raises:
        UserError: another depth.
    """
    require(depth % 6 == 4 and depth > 4, lambda: f"depth={depth} must be 10, 16, 22, 28 or so on: 6 n + 4")
    return WideResNet(depth, classes, channels, width)


def wide_resnet_28_10(classes: int, channels: int = 3, width: int = 160) -> WideResNet:
    """Build WRN-28-10; `width` is the channels of its first stage, the stem stays at 16. See `WideResNet`."""
    return WideResNet(28, classes, channels, width)


def wide_resnet_34_10(classes: int, channels: int = 3, width: int = 160) -> WideResNet:
    """Build WRN-34-10; `width` is the channels of its first stage, the stem stays at 16. See `WideResNet`."""
    return WideResNet(34, classes, channels, width)
