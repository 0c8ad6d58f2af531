"""PreActResNet-18 for small images: normalisation and ReLU before each convolution."""

from __future__ import annotations

from typing import ClassVar, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from advalign.models.head import Head, check_sizes
from advalign.shapes import ImageBatch, Logits


@final
class PreActBlock(nn.Module):
    """Two 3x3 convolutions, each after BatchNorm and ReLU, beside a shortcut. He et al. 2016 (identity mappings)."""

    def __init__(self, c_in: int, c_out: int, stride: int, *, raw_shortcut: bool = False) -> None:
        super().__init__()
        self.raw_shortcut = raw_shortcut
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.shortcut = None
        if stride != 1 or c_in != c_out:
            self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False)

    def forward(self, x: Float[Tensor, "N C_in H W"]) -> Float[Tensor, "N C_out h w"]:
        """Map (N, C_in, H, W) to (N, C_out, H/stride, W/stride), of either sign."""
        out = F.relu(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(x if self.raw_shortcut else out)
        return kept + self.conv2(F.relu(self.bn2(self.conv1(out))))


@final
class PreActResNet(nn.Module):
    """Pre-activation residual network. He et al. 2016, "Identity mappings"; Rice et al. 2020 for adversarial training.

    As in Rice et al.'s code (locuslab/robust_overfitting), a BatchNorm and a ReLU come before the pooling, which
    kuangliu/pytorch-cifar lacks; torch's default initialisation in both. A stage's output is taken before the next
    BatchNorm and ReLU, so it can be negative. We pool over whatever area is left, so that any image size works.

    Args:
        final_norm: the BatchNorm and ReLU before the pooling.
        raw_shortcut: shortcuts that convolve the block's input, and not the normalised and activated one; with it and
            without `final_norm` the network is that of Wong et al. 2020.

    Raises:
        UserError: classes, channels or width too small.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        width: int = 64,
        final_norm: bool = True,
        raw_shortcut: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(classes, channels, width)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.layer1 = preact_stage(width, width, 1, blocks=2, raw_shortcut=raw_shortcut)
        self.layer2 = preact_stage(width, 2 * width, 2, blocks=2, raw_shortcut=raw_shortcut)
        self.layer3 = preact_stage(2 * width, 4 * width, 2, blocks=2, raw_shortcut=raw_shortcut)
        self.layer4 = preact_stage(4 * width, 8 * width, 2, blocks=2, raw_shortcut=raw_shortcut)
        self.bn = nn.BatchNorm2d(8 * width) if final_norm else None
        self.fc = Head(8 * width, classes)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W) to logits (N, classes)."""
        out = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.fc((out if self.bn is None else F.relu(self.bn(out))).mean((2, 3)))


def preact_stage(c_in: int, c_out: int, stride: int, *, blocks: int, raw_shortcut: bool = False) -> nn.Sequential:
    """Build one stage of pre-activation blocks; the first may stride."""
    first = PreActBlock(c_in, c_out, stride, raw_shortcut=raw_shortcut)
    return nn.Sequential(first, *(PreActBlock(c_out, c_out, 1) for _ in range(blocks - 1)))
