"""Networks of DeepMind's robust models and of many after them: SiLU or ReLU, and TensorFlow's padding."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from advalign.errors import require
from advalign.models.head import Head, check_sizes
from advalign.shapes import ImageBatch, Logits

Activation = Literal["silu", "relu"]
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu}


@final
class PaddedBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and activation, beside a shortcut; strided ones pad right and below.

    Args:
        wide_shortcut: a shortcut of 3x3 on the block's input, instead of one of 1x1 on the activated input.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, activation: Activation, *, wide_shortcut: bool) -> None:
        super().__init__()
        self.stride, self.wide_shortcut, self.activate = stride, wide_shortcut, _ACTIVATIONS[activation]
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 0, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 3 if wide_shortcut else 1, stride, 0, bias=False)

    def forward(self, x: Float[Tensor, "N C_in H W"]) -> Float[Tensor, "N C_out h w"]:
        """Map (N, C_in, H, W) to (N, C_out, H/stride, W/stride), of either sign."""
        active, kept = self.activate(self.bn1(x)), x
        if self.shortcut is not None:
            kept = self.shortcut(self._padded(x) if self.wide_shortcut else active)
        out = self.conv1(self._padded(active))
        return kept + self.conv2(self.activate(self.bn2(out)))

    def _padded(self, x: Tensor) -> Tensor:
        return F.pad(x, (1, 1, 1, 1) if self.stride == 1 else (0, 1, 0, 1))


def _stage(
    c_in: int, c_out: int, stride: int, blocks: int, activation: Activation, *, wide_shortcut: bool
) -> nn.Sequential:
    first = PaddedBlock(c_in, c_out, stride, activation, wide_shortcut=wide_shortcut)
    rest = (PaddedBlock(c_out, c_out, 1, activation, wide_shortcut=wide_shortcut) for _ in range(blocks - 1))
    return nn.Sequential(first, *rest)


@final
class DMWideResNet(nn.Module):
    """Wide residual network of Gowal et al. 2020 (deepmind-research, adversarial_robustness), for images of even size.

    Theirs also normalises its images, which `normalized(...)` does here. We pool over whatever area is left.

    Raises:
        UserError: classes, channels, width or depth out of range.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3")

    def __init__(
        self, classes: int, channels: int = 3, depth: int = 28, width: int = 160, activation: Activation = "silu"
    ) -> None:
        super().__init__()
        check_sizes(classes, channels, width)
        require(depth % 6 == 4 and depth > 4, lambda: f"depth={depth} must be 10, 16, 22, 28 or so on: 6 n + 4")
        blocks = (depth - 4) // 6
        self.activate = _ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.layer1 = _stage(16, width, 1, blocks, activation, wide_shortcut=False)
        self.layer2 = _stage(width, 2 * width, 2, blocks, activation, wide_shortcut=False)
        self.layer3 = _stage(2 * width, 4 * width, 2, blocks, activation, wide_shortcut=False)
        self.bn = nn.BatchNorm2d(4 * width)
        self.fc = Head(4 * width, classes)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) to logits (N, classes)."""
        out = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.activate(self.bn(out)).mean((2, 3)))


@final
class DMPreActResNet(nn.Module):
    """Pre-activation ResNet-18 of Rebuffi et al. 2021 (deepmind-research), with shortcuts of 3x3; for even image sizes.

    Theirs also normalises its images, which `normalized(...)` does here. We pool over whatever area is left.

    Raises:
        UserError: classes, channels or width too small.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4")

    def __init__(self, classes: int, channels: int = 3, width: int = 64, activation: Activation = "silu") -> None:
        super().__init__()
        check_sizes(classes, channels, width)
        self.activate = _ACTIVATIONS[activation]
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.layer1 = _stage(width, width, 1, 2, activation, wide_shortcut=True)
        self.layer2 = _stage(width, 2 * width, 2, 2, activation, wide_shortcut=True)
        self.layer3 = _stage(2 * width, 4 * width, 2, 2, activation, wide_shortcut=True)
        self.layer4 = _stage(4 * width, 8 * width, 2, 2, activation, wide_shortcut=True)
        self.bn = nn.BatchNorm2d(8 * width)
        self.fc = Head(8 * width, classes)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) to logits (N, classes)."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.fc(self.activate(self.bn(out)).mean((2, 3)))
