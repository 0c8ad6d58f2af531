"""Convolutions of the fast path on the CPU in a quarter of the multiplications: Winograd's minimal filtering."""

from __future__ import annotations

from functools import cache
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

# F(4, 3), Lavin and Gray 2016 (arXiv 1509.09308), section 4.3: y = OUT @ ((WEIGHT @ w) * (IN @ x)) are the 4 outputs
# that 3 weights have on 6 inputs, in 6 products. In two dimensions each matrix acts on rows and on columns.
IN = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
WEIGHT = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
OUT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)
FEWEST, MOST = 16, 512  # tiles at once: with fewer the products are too thin, with more they leave the caches


@final
class Winograd(nn.Conv2d):
    """A wide 3x3 convolution of small maps, 1.2 to 1.9 times as fast as the plain one, which `adopt` turns into this.

    It multiplies transformed weights, four times as large, which it makes when it needs them and keeps until `forget`;
    no gradient reaches them. Where the products would not pay, and under autocast, whose precision is too little for
    the transforms, it is the plain convolution. In float32 its outputs differ from that by about 1e-6 of their norm.
    """

    transformed: Tensor | None

    @classmethod
    def adopt(cls, conv: nn.Conv2d) -> Winograd | None:
        """Turn a convolution into this class where that is faster, and return it; None where it is not."""
        weight, shape = conv.weight, (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        fits = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"
        pays = min(weight.shape[:2]) >= 256 and weight.device.type == "cpu"
        if type(conv) is not nn.Conv2d or not fits or not pays or weight.dtype not in (torch.float32, torch.float64):
            return None
        conv.__class__ = cls
        assert isinstance(conv, cls)
        conv.transformed = None
        return conv

    def forget(self) -> None:
        """Drop the transformed weights: the present ones are others, or memory is wanted."""
        self.transformed = None

    def forward(self, x: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Map (N, C_in, H, W) to (N, C_out, H, W)."""
        n, _, h, w = x.shape
        tiles = n * (h * w // 16)
        pays = h % 4 == w % 4 == 0 and h * w <= 64 and tiles >= FEWEST
        if not pays or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x.contiguous() if self.weight.is_contiguous() else x)
        if self.transformed is None:
            self.transformed = self._transform()
        if tiles <= MOST:
            return self._convolve(x, self.transformed)
        return torch.cat([self._convolve(piece, self.transformed) for piece in x.split(MOST * n // tiles)])

    @torch.inference_mode(False)  # a tensor made in inference mode could not be in a later graph
    @torch.no_grad()
    def _transform(self) -> Tensor:
        """Return the weights as (36, C_out, C_in)."""
        matrix = torch.from_numpy(np.kron(WEIGHT, WEIGHT)).to(self.weight.dtype)
        taps = self.weight.flatten(2).permute(2, 0, 1).reshape(9, -1)
        return (matrix @ taps).view(36, *self.weight.shape[:2])

    def _convolve(self, x: Tensor, weights: Tensor) -> Tensor:
        n, c, h, w = x.shape
        to_tiles, to_map = _transforms(h, w, x.dtype)
        tiles = to_tiles @ x.permute(2, 3, 0, 1).reshape(h * w, n * c)
        products = tiles.view(36, -1, c) @ weights.mT
        out = (to_map @ products.view(-1, n * self.out_channels)).view(h, w, n, self.out_channels)
        out = out if self.bias is None else out + self.bias
        return out.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


@cache
@torch.inference_mode(False)
def _transforms(h: int, w: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return what maps a map's pixels to the points of its tiles, (36 * tiles, h * w), and points to pixels."""
    (in_rows, out_rows), (in_columns, out_columns) = _along(h), _along(w)
    to_tiles = np.einsum("pih,qjw->pqijhw", in_rows, in_columns).reshape(-1, h * w)
    to_map = np.einsum("hpi,wqj->hwpqij", out_rows, out_columns).reshape(h * w, -1)
    return torch.from_numpy(to_tiles).to(dtype), torch.from_numpy(to_map).to(dtype)


def _along(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the same for one side: (6, size / 4, size), without the zeros around the map, and (size, 6, size / 4)."""
    tiles = size // 4
    padded, out = np.zeros((6, tiles, size + 2)), np.zeros((tiles, 4, 6, tiles))
    for tile in range(tiles):
        padded[:, tile, 4 * tile : 4 * tile + 6] = IN
        out[tile, :, :, tile] = OUT
    return padded[:, :, 1:-1], out.reshape(size, 6, tiles)
