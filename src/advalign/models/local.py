"""A network on images that differ from the ones before in one square each: only what the square reaches is computed.

A convolution looks at a neighbourhood. A change of few pixels changes few values of the first maps, and the others are
known already. Square asks for thousands of such images. Nothing is approximated: each value is what the network
computes from these inputs, now or when it last saw them.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from advalign.models.foldable import has_hooks, trace
from advalign.models.winograd import Winograd
from advalign.shapes import ImageBatch, Labels, Logits, Mask

POINTWISE = {
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.CELU, nn.SELU, nn.SiLU, nn.GELU, nn.Mish, nn.Softplus),
    *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Dropout, nn.Dropout2d),
    *(F.relu, F.relu6, F.leaky_relu, F.elu, F.silu, F.gelu, F.mish, F.softplus, F.hardtanh, F.hardswish),
    *(torch.relu, torch.sigmoid, torch.tanh, torch.add, torch.sub, torch.mul, torch.div, torch.clamp, torch.neg),
    *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul, operator.truediv),
}
IN_PLACE = {"iadd", "isub", "imul"}
LARGEST = 0.6
"""Share of a map from which on it is computed whole."""
MOVED, STARTED = 150, 2e6
"""Multiplications in whose time a kept value is read, remembered, written and put back, and a window is prepared."""
WORTH = 0.75
"""Share of the network's multiplications, these included, above which the whole network is run."""
MEMORY = 2**30
"""Bytes at most that the kept maps take."""


@dataclass(frozen=True, eq=False)
class _Span:
    """The values along one side of a map that a square reaches, by the place where it begins, from first to last."""

    first: np.ndarray
    last: np.ndarray
    length: int  # of that side

    @cached_property
    def size(self) -> int:
        """The length of the windows, which hold these values at any place."""
        return int((self.last - self.first).max()) + 1

    @cached_property
    def start(self) -> Tensor:
        """Where the windows begin."""
        return torch.from_numpy(np.minimum(self.first, self.length - self.size))

    @property
    def share(self) -> float:
        return self.size / self.length

    def has_windows_of(self, other: _Span) -> bool:
        return self.size == other.size and bool((self.start == other.start).all())

    def after(self, kernel: int, stride: int, padding: int, dilation: int, length: int) -> _Span:
        """Return the values of a convolution's output, of that length, that read one of these."""
        first = np.clip(-((dilation * (kernel - 1) - padding - self.first) // stride), 0, length - 1)
        return _Span(first, np.clip((self.last + padding) // stride, first, length - 1), length)


def _union(one: _Span, *others: _Span) -> _Span:
    first = np.minimum.reduce([one.first, *(span.first for span in others)])
    return _Span(first, np.maximum.reduce([one.last, *(span.last for span in others)]), one.length)


Window = tuple[_Span, _Span]  # of rows, of columns


class _Plan(NamedTuple):
    windows: dict[fx.Node, Window]  # of the maps that are computed in part
    margins: dict[fx.Node, int]  # zeros around those that are kept, since others read them: the widest padding
    cost: float  # of an image, in multiplications
    whole: float  # that of the whole network
    numbers: int  # that are kept of an image


@final
class LocalNet:
    """A network in eval mode, traced, for images of one shape and type.

    Args:
        net: images (N, C, H, W) to logits (N, K).
        image: one of them, (1, C, H, W).

    Raises:
        Exception: whatever a forward raises that torch.fx runs on symbols.
    """

    def __init__(self, net: nn.Module, image: ImageBatch) -> None:
        before = _random_states()
        self.traced = fx.GraphModule(net, trace(net))
        self.nodes = list(self.traced.graph.nodes)
        self.convolutions: dict[fx.Node, nn.Conv2d] = {}
        self.pointwise: set[fx.Node] = set()
        blocks = (module for module in net.modules() if any(module.children()))
        self._fits = not any(map(has_hooks, blocks))  # a hook on a whole block would be passed over
        for node in self.nodes:
            module = net.get_submodule(str(node.target)) if node.op == "call_module" else None
            if isinstance(module, nn.Conv2d) and _is_plain(module):
                self.convolutions[node] = module
            elif _is_pointwise(node, module):
                self.pointwise.add(node)
            self._fits = self._fits and not _changes_shared_map(node, module)
        self._shapes, self._images = _Shapes(self.traced).of(image.clone()), image.shape[1:]
        steady = torch.equal(net(image.clone()), net(image.clone())) and _random_states() == before
        self._fits = self._fits and steady  # what is random has to be drawn anew by each pass
        self._plans: dict[int, _Plan] = {}

    def begin(self, images: ImageBatch, side: int) -> LocalRun | None:
        """Run on images (N, C, H, W), to go on with squares of that side; None where that saves too little.

        The network may work in place on what it is given, here and in `LocalRun.propose`.
        """
        if not self._fits or images.shape[1:] != self._images or side > min(images.shape[2:]):
            return None
        if side not in self._plans:
            self._plans[side] = self._plan(side)
        plan = self._plans[side]
        vain = plan.cost + STARTED * len(plan.windows) / len(images) > WORTH * plan.whole
        if vain or plan.numbers * images.element_size() * len(images) > MEMORY:
            return None
        return LocalRun(self, plan, images)

    def _plan(self, side: int) -> _Plan:
        windows, margins = dict[fx.Node, Window](), dict[fx.Node, int]()
        for node in self.nodes:
            window = self._window(node, windows, side)
            if window is not None and _share(window) <= LARGEST:
                windows[node] = window
        cost, whole, numbers = 0.0, 0.0, 0
        for node in self.nodes:
            conv, share = self.convolutions.get(node), _share(windows[node]) if node in windows else 1.0
            work = 0 if conv is None else self._shapes[node].numel() * conv.weight[0].numel()
            cost, whole = cost + share * work, whole + work
            if node in windows and not self._handed_on(node, windows):
                readers = [
                    self.convolutions[user] for user in node.users if user in windows and user in self.convolutions
                ]
                margins[node] = max((int(padding) for reader in readers for padding in reader.padding), default=0)
                cost += share * MOVED * self._shapes[node].numel()
                _, channels, height, width = self._shapes[node]
                numbers += channels * (height + 2 * margins[node]) * (width + 2 * margins[node])
        return _Plan(windows, margins, cost, whole, numbers)

    def _window(self, node: fx.Node, windows: dict[fx.Node, Window], side: int) -> Window | None:
        """Return what a square reaches of a node's map; None where that is not known, or all of it."""
        shape = self._shapes.get(node, ())
        if len(shape) != 4 or 0 in shape:
            return None
        if node.op == "placeholder":
            return _spans(_Span(at, at + side - 1, n) for n in shape[2:] for at in [np.arange(n - side + 1)])
        sources = [source for source in node.all_input_nodes if not self._is_constant(source)]
        if not sources or any(source not in windows for source in sources):
            return None
        if node in self.convolutions:
            conv, (rows, columns) = self.convolutions[node], windows[sources[0]]
            numbers = zip(conv.kernel_size, conv.stride, map(int, conv.padding), conv.dilation, shape[2:], strict=True)
            return _spans(span.after(*each) for span, each in zip((rows, columns), numbers, strict=True))
        if node in self.pointwise and all(self._shapes[source] == shape for source in sources):
            return _spans(_union(*spans) for spans in zip(*(windows[source] for source in sources), strict=True))
        return None

    def _is_constant(self, node: fx.Node) -> bool:
        """Tell whether a node is a tensor of the network that has one value, or one for each channel."""
        return node.op == "get_attr" and all(length == 1 for length in self._shapes[node][-2:])

    def _handed_on(self, node: fx.Node, windows: dict[fx.Node, Window]) -> bool:
        """Tell whether the one reader of a map needs no more of it than what is computed anew."""
        reader = next(iter(node.users), None)
        if len(node.users) != 1 or reader not in self.pointwise or reader not in windows or node.op == "placeholder":
            return False
        return all(mine.has_windows_of(its) for mine, its in zip(windows[node], windows[reader], strict=True))


class _Shapes(fx.Interpreter):
    """The shapes of all tensors on the way. The one that torch.fx has takes two seconds to import."""

    def of(self, image: ImageBatch) -> dict[fx.Node, torch.Size]:
        self._found: dict[fx.Node, torch.Size] = {}
        self.run(image)
        return self._found

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self._found[n] = value.shape
        return value


@final
class LocalRun(fx.Interpreter):
    """Images (N, C, H, W) and the maps that a network makes of them; one square of each changes at a time."""

    def __init__(self, net: LocalNet, plan: _Plan, images: ImageBatch) -> None:
        super().__init__(net.traced)
        self._convolutions, self._margins, self._windows = net.convolutions, plan.margins, dict[fx.Node, Window]()
        self._maps: dict[fx.Node, Tensor] = {}  # (N, H, W, C) amid zeros
        self._before: list[tuple[Tensor, Tensor, Tensor]] = []  # a kept map by pixels, which of them, what they were
        self._tables: dict[tuple[fx.Node, fx.Node], tuple[Tensor, Tensor]] = {}  # see `_places`
        self.run(images)
        self._windows = plan.windows

    def propose(self, images: ImageBatch, top: Labels, left: Labels) -> Logits:
        """Return logits (N, K) of images that are the kept ones but for the squares with these corners (N,)."""
        self._top, self._left, self._before = top, left, []
        return self.run(images)

    def keep(self, accepted: Mask) -> None:
        """Keep the proposals that are accepted (N,), and go back to what was before for the others."""
        rejected = (~accepted).nonzero().squeeze(1)
        for pixels, places, values in self._before:
            where, old = places.index_select(0, rejected), values.index_select(0, rejected)
            pixels.index_copy_(0, where.flatten(), old.flatten(0, 1))

    def take(self, rows: Mask) -> None:
        """Go on with some of the images alone."""
        self._maps, self._before = {node: kept[rows] for node, kept in self._maps.items()}, []

    def run_node(self, n: fx.Node) -> Any:
        """Compute a node's map, in its window or whole, and keep what others will read of it."""
        local = n in self._windows and n.op != "placeholder"
        value = self._convolve(n) if local and n in self._convolutions else super().run_node(n)
        if n in self._margins:
            self._keep_window(n, value) if local else self._keep_whole(n, value)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return a node's arguments: of kept maps the window, where it is computed in one, else the whole."""

        def value(source: fx.Node) -> Any:
            if source not in self._windows or source not in self._margins:
                return self.env[source]
            return self._read(source, n) if n in self._windows else self._read_whole(source)

        return fx.map_arg(n.args, value), fx.map_arg(n.kwargs, value)

    def _convolve(self, n: fx.Node) -> Tensor:
        conv, (source,) = self._convolutions[n], n.all_input_nodes
        return F.conv2d(self._read(source, n), conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)

    def _read(self, source: fx.Node, reader: fx.Node) -> Tensor:
        """Return windows (N, C, h, w) of a kept map, with all of it that the reader's windows depend on."""
        kept, (places, height, width) = self._maps[source], self._places(source, reader)
        pixels = kept.view(-1, kept.shape[3]).index_select(0, places.flatten())
        return pixels.view(len(kept), height, width, -1).permute(0, 3, 1, 2)

    def _read_whole(self, source: fx.Node) -> Tensor:
        """Return a copy (N, C, H, W) of a kept map, on which a network may work in place."""
        kept, margin = self._maps[source], self._margins[source]
        _, height, width, _ = kept.shape
        inside = kept[:, margin : height - margin, margin : width - margin]
        return inside.permute(0, 3, 1, 2).clone(memory_format=torch.channels_last)

    def _keep_whole(self, n: fx.Node, value: Tensor) -> None:
        margin = self._margins[n]
        padded = F.pad(value.permute(0, 2, 3, 1), (0, 0, margin, margin, margin, margin))
        self._maps[n] = padded.clone(memory_format=torch.contiguous_format)  # padding by nothing copies nothing

    def _keep_window(self, n: fx.Node, value: Tensor) -> None:
        kept, (places, _, _) = self._maps[n], self._places(n, n)
        pixels, where = kept.view(-1, kept.shape[3]), places.flatten()
        self._before.append((pixels, places, pixels.index_select(0, where).view(*places.shape, -1)))
        pixels.index_copy_(0, where, value.permute(0, 2, 3, 1).reshape(len(where), -1))

    def _places(self, source: fx.Node, reader: fx.Node) -> tuple[Tensor, int, int]:
        """Return which pixels (N, h * w) of a kept map a reader's windows depend on, of all in one row, and h and w."""
        count, tall, wide, _ = self._maps[source].shape
        if (source, reader) not in self._tables:
            rows, columns = self._lines(source, reader)
            self._tables[source, reader] = rows * wide, columns
        rows, columns = self._tables[source, reader]
        rows = rows[self._top] + torch.arange(0, count * tall * wide, tall * wide, device="cpu")[:, None]
        columns = columns[self._left]
        places = rows[:, :, None] + columns[:, None]
        return places.flatten(1), rows.shape[1], columns.shape[1]

    def _lines(self, source: fx.Node, reader: fx.Node) -> list[Tensor]:
        """Return the rows (places, h) and the columns (places, w) of a kept map, from its margin on, for each place."""
        spans, lines = self._windows[reader], []
        conv = self._convolutions.get(reader) if reader is not source else None
        for axis, span in enumerate(spans):
            first, size = span.start, span.size
            if conv is not None:
                first = first * conv.stride[axis] - int(conv.padding[axis])
                size = (size - 1) * conv.stride[axis] + conv.dilation[axis] * (conv.kernel_size[axis] - 1) + 1
            lines.append((first + self._margins[source])[:, None] + torch.arange(size, device="cpu"))
        return lines


def _spans(pair: Iterable[_Span]) -> Window:
    rows, columns = pair
    return rows, columns


def _share(window: Window) -> float:
    rows, columns = window
    return rows.size * columns.size / (rows.length * columns.length)


def _is_plain(module: nn.Conv2d) -> bool:
    """Tell whether a convolution is no more than its weights, amid zeros."""
    known = type(module) in (nn.Conv2d, Winograd) and module.padding_mode == "zeros"
    return known and not isinstance(module.padding, str) and not has_hooks(module)


def _is_pointwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Tell whether each value of a node depends on those at the same place alone."""
    if module is None:
        return node.target in POINTWISE
    if isinstance(module, nn.BatchNorm2d):
        known = type(module) is nn.BatchNorm2d and module.track_running_stats and not module.training
    else:
        known = type(module) in POINTWISE or (type(module) is nn.Sequential and not len(module))
    return known and not has_hooks(module)


def _changes_shared_map(node: fx.Node, module: nn.Module | None) -> bool:
    """Tell whether a node works in place on what others read as well, before it or after it."""
    asked = getattr(module, "inplace", False) or node.kwargs.get("inplace") or any(each is True for each in node.args)
    named = (
        node.target
        if isinstance(node.target, str) and node.op == "call_method"
        else getattr(node.target, "__name__", "")
    )
    source = node.args[0] if node.args else None
    in_place = bool(asked) or named in IN_PLACE or (named.endswith("_") and not named.endswith("__"))
    return in_place and isinstance(source, fx.Node) and len(source.users) > 1


def _random_states() -> tuple[Any, ...]:
    """Return the states of the generators from which a network on the CPU may draw."""
    return tuple(torch.get_rng_state().tolist()), random.getstate(), str(np.random.get_state(legacy=False))  # noqa: NPY002 (a network may draw so)
