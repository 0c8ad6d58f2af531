"""Convolutions of the fast path on the CPU in a quarter of the multiplications: Winograd's minimal filtering."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, final

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
CHANNELS = 256  # with fewer, the larger weights cost other layers their place in the caches
FEWEST, MOST = 32, 512  # tiles at once: with fewer the products are too thin, with more they leave the caches


@final
class Winograd(nn.Conv2d):
    """A wide 3x3 convolution with frozen weights, which `adopt` turns into this; faster on small maps.

    It multiplies transformed weights, four times as large, which it makes when it needs them and keeps until `forget`.
    Where that would not pay, and under autocast, whose precision is too little for it, it is the plain convolution.
    """

    transformed: Tensor | None

    @classmethod
    def adopt(cls, conv: nn.Conv2d) -> Winograd | None:
        """Turn a convolution into this class where that is right and faster, and return it; None where it is not."""
        weight, shape = conv.weight, (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        fits = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.padding_mode == "zeros"
        exact = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)
        moves = weight.requires_grad or conv._forward_pre_hooks  # such a hook may set the weights at each call
        if type(conv) is not nn.Conv2d or not fits or not exact or moves or min(weight.shape[:2]) < CHANNELS:
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
        if x.ndim != 4 or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return self._plain(x)
        n, _, h, w = x.shape
        tiles = n * (h * w // 16)
        if h % 4 or w % 4 or max(h, w) > 16 or tiles < FEWEST:
            return self._plain(x)
        if self.transformed is None:
            self.transformed = self._transform()
        if tiles <= MOST:
            return self._convolve(x, self.transformed)
        return torch.cat([self._convolve(piece, self.transformed) for piece in x.split(MOST * n // tiles)])

    def _plain(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous() if self.weight.is_contiguous() else x)

    @torch.no_grad()
    def _transform(self) -> Tensor:
        """Return the weights as (36, C_out, C_in)."""
        matrix = torch.from_numpy(np.kron(WEIGHT, WEIGHT)).to(self.weight.dtype)
        taps = self.weight.flatten(2).permute(2, 0, 1).reshape(9, -1)
        return (matrix @ taps).view(36, *self.weight.shape[:2])

    def _convolve(self, x: Tensor, weights: Tensor) -> Tensor:
        out = _Products.apply(x, weights.mT, _maps(x.shape[2], x.shape[3], x.dtype))
        return out if self.bias is None else out + self.bias[:, None, None]


class _Maps(NamedTuple):
    """Matrices that take the sides of a map to those of its tiles, and back."""

    rows_in: Tensor  # (height / 4 * 6, height): tiles, then points
    columns_in: Tensor  # (6 * width / 4, width): points, then tiles
    rows_out: Tensor
    columns_out: Tensor

    def backward(self) -> _Maps:
        """Return those of the gradient, which goes the way back."""
        return _Maps(self.rows_out.mT, self.columns_out.mT, self.rows_in.mT, self.columns_in.mT)


class _Products(torch.autograd.Function):
    """The convolution by weights (36, C_in, C_out); the gradient to its input is the same, all matrices transposed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, maps: _Maps) -> Tensor:
        ctx.weights, ctx.maps = weights, maps
        return _multiplied(x, weights, maps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        with torch.autocast("cpu", enabled=False):  # as in the forward pass, wherever this is called
            return _Products.apply(*grad_outputs, ctx.weights.mT, ctx.maps.backward()), None, None


def _multiplied(x: Tensor, weights: Tensor, maps: _Maps) -> Tensor:
    """Map (N, C_in, H, W) to (N, C_out, H, W), in channels_last; a row of tiles at a time is multiplied."""
    (n, c, h, w), channels = x.shape, weights.shape[2]
    tall, wide = len(maps.rows_in) // 6, len(maps.columns_in) // 6
    rows = maps.rows_in @ x.permute(2, 3, 0, 1).reshape(h, -1)
    points = (maps.columns_in @ rows.view(-1, w, n * c)).view(tall, 36, wide * n, c)
    products = points.new_empty(tall, 36, wide * n, channels)
    for one, out in zip(points, products, strict=True):
        torch.bmm(one, weights, out=out)
    rows = maps.columns_out @ products.view(tall * 6, 6 * wide, n * channels)
    out = (maps.rows_out @ rows.view(tall * 6, -1)).view(h, w, n, channels)
    return out.permute(2, 3, 0, 1).contiguous(memory_format=torch.channels_last)


@cache
def _maps(h: int, w: int, dtype: torch.dtype) -> _Maps:
    (rows_in, rows_out), (columns_in, columns_out) = _along(h), _along(w)
    matrices = (
        rows_in.reshape(-1, h),
        columns_in.transpose(1, 0, 2).reshape(-1, w),
        rows_out.reshape(h, -1),
        columns_out.transpose(0, 2, 1).reshape(w, -1),
    )
    return _Maps(*(torch.from_numpy(matrix).to(dtype) for matrix in matrices))


def _along(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the matrices of one side, (tiles, 6, size), without the zeros around the map, and (size, tiles, 6)."""
    tiles = size // 4
    padded, out = np.zeros((tiles, 6, size + 2)), np.zeros((tiles, 4, tiles, 6))
    for tile in range(tiles):
        padded[tile, :, 4 * tile : 4 * tile + 6] = IN
        out[tile, :, tile, :] = OUT
    return padded[:, :, 1:-1], out.reshape(size, tiles, 6)
