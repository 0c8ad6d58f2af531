"""CIFAR ResNet-18 and ResNet-34: a 3x3 stem without pooling, four stages, post-activation."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from advalign.errors import require
from advalign.models.head import Head, check_sizes
from advalign.shapes import ImageBatch, Logits

STRIDES = (1, 2, 2, 2)
"""Of the four stages, as the papers' networks have them."""


@final
class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; the sum passes a ReLU. (N, C_in, H, W) to (N, C_out, H/s, W/s)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.shortcut = nn.Sequential()
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Float[Tensor, "N C_in H W"]) -> Float[Tensor, "N C_out h w"]:
        """Map (N, C_in, H, W) to (N, C_out, H/stride, W/stride), non-negative."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


@final
class ResNet(nn.Module):
    """Residual network for small images. He et al. 2016, section 4.2, in the widths of its ImageNet version.

    The layout and the initialisation (torch's defaults) are those of kuangliu/pytorch-cifar, which the adversarial
    training papers use. We pool over whatever area is left, so that any image size works.

    Args:
        strides: of the four stages; (1, 1, 2, 2) leaves maps of 8 x 8 for images of 32 x 32, as LBGAT's guide has them.

    Raises:
        UserError: classes, channels, width or a stride too small.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        classes: int,
        channels: int = 3,
        width: int = 64,
        strides: tuple[int, int, int, int] = STRIDES,
    ) -> None:
        super().__init__()
        check_sizes(classes, channels, width)
        require(min(strides) >= 1, lambda: f"strides={strides} must be at least 1")
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, strides[0], blocks[0])
        self.layer2 = _stage(width, 2 * width, strides[1], blocks[1])
        self.layer3 = _stage(2 * width, 4 * width, strides[2], blocks[2])
        self.layer4 = _stage(4 * width, 8 * width, strides[3], blocks[3])
        self.fc = Head(8 * width, classes)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) to logits (N, classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.fc(out.mean((2, 3)))


def resnet18(classes: int, channels: int = 3, width: int = 64, strides: tuple[int, int, int, int] = STRIDES) -> ResNet:
    """Build ResNet-18; `width` is the channels of its first stage. See `ResNet`."""
    return ResNet((2, 2, 2, 2), classes, channels, width, strides)


def resnet34(classes: int, channels: int = 3, width: int = 64, strides: tuple[int, int, int, int] = STRIDES) -> ResNet:
    """Build ResNet-34; `width` is the channels of its first stage. See `ResNet`."""
    return ResNet((3, 4, 6, 3), classes, channels, width, strides)


def _stage(c_in: int, c_out: int, stride: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(BasicBlock(c_in, c_out, stride), *(BasicBlock(c_out, c_out, 1) for _ in range(blocks - 1)))
