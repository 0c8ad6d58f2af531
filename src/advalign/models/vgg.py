"""VGG16 with BatchNorm for 32x32 images: five blocks and one linear head."""

from __future__ import annotations

from typing import ClassVar, final

from torch import nn

from advalign.models.head import Head, check_sizes
from advalign.shapes import ImageBatch, Logits


@final
class VGG16(nn.Module):
    """VGG16 with BatchNorm. Simonyan and Zisserman 2015, configuration D; Ioffe and Szegedy 2015.

    As in kuangliu/pytorch-cifar (biased convolutions, torch's default initialisation, one linear layer in place of
    the paper's three), its layers grouped into blocks that each end in a 2x2 max-pool. Five pools need images of at
    least 32x32; larger ones are averaged over the area left.

    Raises:
        UserError: classes, channels or width too small.
    """

    stages: ClassVar[tuple[str, ...]] = ("layer1", "layer2", "layer3", "layer4", "layer5")

    def __init__(self, classes: int, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        check_sizes(classes, channels, width)
        self.layer1 = _block(channels, width, convs=2)
        self.layer2 = _block(width, 2 * width, convs=2)
        self.layer3 = _block(2 * width, 4 * width, convs=3)
        self.layer4 = _block(4 * width, 8 * width, convs=3)
        self.layer5 = _block(8 * width, 8 * width, convs=3)
        self.fc = Head(8 * width, classes)

    def forward(self, x: ImageBatch) -> Logits:
        """Map images (N, C, H, W), H and W at least 32, to logits (N, classes)."""
        out = self.layer5(self.layer4(self.layer3(self.layer2(self.layer1(x)))))
        return self.fc(out.mean((2, 3)))


def _block(c_in: int, c_out: int, *, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for c in (c_in, *[c_out] * (convs - 1)):
        layers += [nn.Conv2d(c, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2))
