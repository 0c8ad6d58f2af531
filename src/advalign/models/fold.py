"""The fast path of attacks and evaluation: a network in eval mode whose BatchNorms are folded into its convolutions."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from itertools import chain
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, fx, nn

from advalign.models.taps import Tapped
from advalign.models.winograd import Winograd
from advalign.shapes import ImageBatch


class _Pair(NamedTuple):
    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    folded: nn.Conv2d


@final
class Folded(nn.Module):
    """The same function as `net` in eval mode, about 1.4 times faster; call `refresh` when the weights have changed.

    The twin that runs shares all storage with the network but the folded convolutions, and has no trainable
    parameter. On the CPU it may hold transformed weights as well, until `refresh` or `release`: see `Winograd`. A
    network that torch.fx cannot trace is not folded. Neither twin nor network is a sub-module, so there is nothing to
    optimise, save or move here. Python attributes (a norm's view) stay as they were when this was built.
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
        return self.twin(x)

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
        shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in self.net.parameters()}
        shared |= {id(b): b for b in self.net.buffers()}
        twin = copy.deepcopy(self.net, shared).eval()
        root, twin_root = (net.net if isinstance(net, Tapped) else net for net in (self.net, twin))
        self.pairs = []
        for conv_name, norm_name in _foldable(twin_root):
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
        self._built_on = self._addresses()

    def _hide(self, name: str, net: nn.Module) -> None:
        object.__setattr__(self, name, net)  # past Module.__setattr__, which would register a second set of parameters

    def _addresses(self) -> list[tuple[int, torch.dtype, torch.device]]:
        tensors = chain(self.net.parameters(), self.net.buffers())
        return [(tensor.data_ptr(), tensor.dtype, tensor.device) for tensor in tensors]


class _Tracer(fx.Tracer):
    """Leaves hooks out: a tap wants tensors, not the tracer's symbols."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Look into no module without children: nothing in it can be folded, and its code may not suit symbols."""
        return not any(m.children()) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _foldable(net: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each convolution and the BatchNorm that alone reads it, where no hook looks in between."""
    options = {
        p.name: p.default for p in inspect.signature(net.forward).parameters.values() if p.default is not p.empty
    }
    try:
        graph = _Tracer().trace(net, concrete_args=options)
    except Exception:  # a user's forward, run on symbols, may raise anything; the unfolded twin is right
        return []
    named = {node: _module_named(node) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    uses = Counter(named.values())
    calls = [(node, name) for node, name in named.items() if node.op == "call_module" and uses[name] == 1]
    once = {node: net.get_submodule(name) for node, name in calls}
    hooked = [name for name, module in net.named_modules() if module._forward_hooks or module._forward_pre_hooks]
    pairs = []
    for source, conv in once.items():
        reader = next(iter(source.users), None)
        norm = once.get(reader) if reader is not None and len(source.users) == 1 else None
        if reader is None or type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
            continue
        watched = any(_within(named[source], name) != _within(named[reader], name) for name in hooked)
        if norm.track_running_stats and not watched:
            pairs.append((named[source], named[reader]))
    return pairs


def _wide(conv: nn.Conv2d) -> bool:
    """Tell whether a convolution is faster in NCHW: on the CPU, where many channels go with maps of few pixels."""
    return conv.weight.device.type == "cpu" and conv.in_channels >= 256 and conv.kernel_size != (1, 1)


def _in_nchw(_module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].contiguous(),)


def _module_named(node: fx.Node) -> str:
    """Return the module that a node calls, or whose tensor it reads."""
    target = str(node.target)
    return target if node.op == "call_module" else target.rpartition(".")[0]


def _within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}." if module else "")
