"""The fast path of attacks and evaluation: a network in eval mode whose BatchNorms are folded into its convolutions."""

from __future__ import annotations

import copy
from itertools import chain
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from advalign.models.adapted import Adapted
from advalign.models.foldable import foldable_pairs, note_unfolded
from advalign.models.modes import evaluating
from advalign.models.taps import Output, Tapped
from advalign.models.winograd import Winograd
from advalign.shapes import ImageBatch

TRIED = 16
"""Images at most on which the twin is compared with the network."""


class _Pair(NamedTuple):
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    folded: nn.Conv2d


@final
class Folded(nn.Module):
    """The same function as `net` in eval mode, about 1.4 times faster; call `refresh` when the weights have changed.

    The twin that runs shares all storage with the network but the folded convolutions, and has no trainable
    parameter. On the CPU it may hold transformed weights as well, until `refresh` or `release`: see `Winograd`. A
    network that torch.fx cannot trace is not folded. One of which no twin can be made, or whose twin fails or gives
    something else on the first images, runs itself, in eval mode, and the log says so. Neither twin nor network is a
    sub-module, so there is nothing to optimise, save or move here. Python attributes (a norm's view) stay as they were
    when this was built.
    """

    net: nn.Module
    twin: nn.Module
    pairs: list[_Pair]
    fast: list[Winograd]

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self._hide("net", net)
        self._build()
        self.refresh()
        self.eval()

    def train(self, mode: bool = True) -> Folded:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, x: ImageBatch) -> Any:
        """Map images (N, C, H, W) in [0, 1], best in channels_last, to what the network gives: logits, or `Output`."""
        if not (self._tried or torch.compiler.is_compiling()):
            self.try_out(x)
        return self._run_network(x) if self.twin is self.net else self.twin(x)

    @torch.no_grad()
    def try_out(self, x: ImageBatch) -> None:
        """Compare the twin with the network on the first of these images, once; see the class."""
        if self._tried:
            return
        self._tried = True
        if self.twin is self.net or x.is_meta:  # without values, there is nothing to compare
            return
        x, outputs = x[:TRIED], []
        try:
            with torch.autocast(x.device.type, enabled=False), evaluating(self.net):
                for net in (self.twin, self.net):
                    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # both draw the same, and no more
                        outputs.append(net(x.clone()))
        except Exception as error:  # a user's forward may raise anything; if the network does too, it raises again
            self._give_up(f"its copy fails: {type(error).__name__}: {error}")
            return
        if not _same(outputs[0], outputs[1], x.dtype):
            self._give_up("its copy gives other outputs")

    def _run_network(self, x: Tensor) -> Any:
        with evaluating(self.net):
            return self.net(x)

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold the network's present weights and statistics; follow it to another device, type or memory format."""
        if self._addresses() != self._built_on:
            self._build()
        for conv, norm, folded in self.pairs:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            assert folded.bias is not None
            scale = (norm.running_var + norm.eps).rsqrt()
            scale = scale * norm.weight if norm.affine else scale
            bias = -norm.running_mean if conv.bias is None else conv.bias - norm.running_mean
            folded.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
            folded.bias.copy_(bias * scale + norm.bias if norm.affine else bias * scale)
        self.release()

    def release(self) -> None:
        """Free the memory that the twin takes only while it runs."""
        for conv in self.fast:
            conv.forget()

    def _build(self) -> None:
        self._tried, self._built_on = False, self._addresses()
        try:
            self._build_twin()
        except Exception as error:  # of a network that cannot be copied
            self._give_up(f"it cannot be copied: {type(error).__name__}: {error}")

    def _give_up(self, reason: str) -> None:
        self.pairs, self.fast = [], []
        self._hide("twin", self.net)
        note_unfolded(self.net.net if isinstance(self.net, Tapped | Adapted) else self.net, reason)

    def _build_twin(self) -> None:
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.net.parameters()}
        shared |= {id(b): b for b in self.net.buffers()}
        twin = copy.deepcopy(self.net, shared).eval()
        root, twin_root = (net.net if isinstance(net, Tapped | Adapted) else net for net in (self.net, twin))
        self.pairs = []
        for conv_name, norm_name in foldable_pairs(twin_root):
            conv, norm = root.get_submodule(conv_name), root.get_submodule(norm_name)
            folded, unused = twin_root.get_submodule(conv_name), twin_root.get_submodule(norm_name)
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(folded, nn.Conv2d)
            assert isinstance(norm, nn.BatchNorm2d)
            layout = torch.contiguous_format if _wide(conv) else torch.channels_last
            weight = torch.empty_like(conv.weight, memory_format=layout)
            folded.weight = nn.Parameter(weight, requires_grad=False)
            folded.bias = nn.Parameter(weight.new_empty(conv.out_channels), requires_grad=False)
            for parent in list(twin_root.modules()):
                for name, child in list(parent._modules.items()):  # under each of its names
                    if child is unused:
                        setattr(parent, name, nn.Identity())
            self.pairs.append(_Pair(conv, norm, folded))
        self.fast = [fast for conv in twin.modules() if isinstance(conv, nn.Conv2d) if (fast := Winograd.adopt(conv))]
        for _, _, folded in self.pairs:
            if _wide(folded) and not isinstance(folded, Winograd):
                folded.register_forward_pre_hook(_in_nchw)
        self._hide("twin", twin)

    def _hide(self, name: str, net: nn.Module) -> None:
        object.__setattr__(self, name, net)  # past Module.__setattr__, which would register a second set of parameters

    def _addresses(self) -> list[tuple[int, torch.dtype, torch.device]]:
        tensors = chain(self.net.parameters(), self.net.buffers())
        return [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]


def _wide(conv: nn.Conv2d) -> bool:
    """Tell whether a convolution is faster in NCHW: on the CPU, where many channels go with maps of few pixels."""
    return conv.weight.device.type == "cpu" and conv.in_channels >= 256 and conv.kernel_size != (1, 1)


def _in_nchw(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].contiguous(),)


def _same(ours: Any, plain: Any, computed_in: torch.dtype) -> bool:
    """Tell whether outputs agree up to rounding; what is neither tensor nor `Output` is not compared."""
    if isinstance(ours, Output):
        pairs = [(ours.logits, plain.logits), *((ours.features[name], plain.features[name]) for name in plain.features)]
    else:
        pairs = [(ours, plain)]
    return all(isinstance(a, Tensor) and isinstance(b, Tensor) and _close(a, b, computed_in) for a, b in pairs)


def _close(ours: Tensor, plain: Tensor, computed_in: torch.dtype) -> bool:
    if ours.shape != plain.shape or not plain.is_floating_point():
        return False
    coarse = torch.finfo(torch.float16).eps if plain.is_cuda else 0.0  # products in TF32 have as few digits
    eps = max(torch.finfo(kind).eps for kind in (plain.dtype, computed_in))  # a mix of fp32 networks gives float64
    relative = min(0.1, 10 * max(eps, coarse) ** 0.5)
    ours, plain = ours.double(), plain.double()
    scale = plain.nan_to_num(0.0, 0.0, 0.0).abs().amax() if plain.numel() else 0.0
    return torch.allclose(ours, plain, rtol=0, atol=float(relative * scale), equal_nan=True)
