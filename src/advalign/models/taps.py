"""Features by module name: a network that returns its logits and the outputs of named layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from advalign.errors import UserError, require, unknown
from advalign.models.adapted import number_type
from advalign.models.normalize import Normalized
from advalign.shapes import ImageBatch


class Output(NamedTuple):
    """What one pass of a tapped network gives."""

    logits: Tensor
    """(N, classes), as float32 also under autocast, as the features are; rounded before, but for built-in heads."""
    features: Mapping[str, Tensor]
    """Layer name to its output, (N, C, H, W) or as the layer gives it."""


@final
class Tapped(nn.Module):
    """A network that returns `Output`. Layers are module names; `logits` is the logits themselves.

    `penultimate` is what the last linear layer reads: the pooled features of a residual network.

    A frozen one never leaves eval mode, has no trainable parameter and runs without gradients. Copies by
    `copy.deepcopy` are independent. Where a layer runs several times in one pass, its last output counts. A network
    with a tuple `stages`, as the built-in ones have, must not work in place on what its layers give.

    Raises:
        UserError: an unknown layer; in a pass, a layer that does not run or gives no tensor.
    """

    net: nn.Module

    def __init__(self, net: nn.Module, layers: tuple[str, ...], frozen: bool = False) -> None:
        super().__init__()
        self.net, self.layers, self.frozen = net, layers, frozen
        self._tape = _Tape(clones=not _stages(net))
        for layer in layers:
            if layer == "penultimate":
                # First of the hooks: one that detaches what the layer reads must not detach the tap.
                last_linear(net).register_forward_pre_hook(_InputTap(layer, self._tape), prepend=True)
            elif layer != "logits":
                find_layer(net, layer).register_forward_hook(_Tap(layer, self._tape))
        if frozen:
            for parameter in net.eval().parameters():
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Tapped:
        """Set the mode, as every module does; a frozen one stays in eval mode."""
        return super().train(mode and not self.frozen)

    def forward(self, x: ImageBatch) -> Output:
        """Map images (N, C, H, W) in [0, 1], of any floating-point type, to logits and features.

        Raises:
            UserError: the network gives something else than a tensor, in train mode for instance.
        """
        # A new dict, since a compiled graph would have to return what is written to the old one.
        self._tape.running, self._tape.seen = True, {}
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
                # A copy, since the forward may work in place on what it reads, and other networks read the same.
                logits = self.net(x.to(number_type(self.net) or x.dtype, copy=True))
                if not isinstance(logits, Tensor):
                    mode = " in train mode" if self.net.training else ""
                    raise UserError(f"the model must return logits, a tensor (N, K), not {type(logits).__name__}{mode}")
                seen = {**self._tape.seen, "logits": logits}
        finally:
            self._tape.running, self._tape.seen = False, {}
        if silent := [layer for layer in self.layers if layer not in seen]:
            raise UserError(f"layer {silent[0]!r} does not run in the forward pass: choose from {', '.join(seen)}")
        # Under bf16 autocast they come rounded; from here on losses and distances are computed in float32.
        seen = {layer: output.to(torch.promote_types(output.dtype, torch.float32)) for layer, output in seen.items()}
        return Output(seen["logits"], {layer: seen[layer] for layer in self.layers})


def layers(net: nn.Module) -> tuple[str, ...]:
    """Return the layers a method may align to, in order.

    They are a built-in's stages or a network's children, then, where there is one, the last linear layer's input,
    `penultimate`, and `logits`.
    """
    heads = ("penultimate", "logits") if _linear_layers(net) else ("logits",)
    if stages := _stages(net):
        return (*stages, *heads)
    names: list[str] = []
    for name, child in _body(net).named_children():
        if not isinstance(child, nn.ModuleList):  # a list does not run itself
            names.append(name)
        if isinstance(child, nn.Sequential | nn.ModuleList):
            names += [f"{name}.{inner}" for inner, _ in child.named_children()]
    return (*names, *heads)


def last_stage(net: nn.Module) -> str:
    """Return the last stage of a built-in network, the usual layer to align.

    Raises:
        UserError: the network is the user's, and its layer has to be named.
    """
    if stages := _stages(net):
        return stages[-1]
    known = ", ".join(layers(net))
    raise UserError(f"name the layer of {type(_body(net)).__name__} to align, as in layer=NAME: choose from {known}")


def named_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a network under the names that taps know them by."""
    return dict(_body(net).named_modules())


def find_layer(net: nn.Module, layer: str) -> nn.Module:
    """Return the module of a layer's name.

    Raises:
        UserError: there is none.
    """
    modules = named_layers(net)
    if not layer or layer not in modules:
        raise unknown("layer", layer, layers(net))
    return modules[layer]


def last_linear(net: nn.Module) -> nn.Linear:
    """Return the last linear layer, which makes the logits.

    Raises:
        UserError: there is none.
    """
    linear = _linear_layers(net)
    require(bool(linear), lambda: f"{type(_body(net)).__name__} has no linear layer, so no penultimate features")
    return linear[-1]


class _Tape:
    """Where taps write, during a pass and not else: kept outputs would hold the graph, and cannot be deep-copied.

    The network goes on with a clone (8 % of a narrow network's step), since an in-place ReLU or `+=` after the tap
    would overwrite the output. Networks with `stages` promise to do no such thing.
    """

    def __init__(self, clones: bool) -> None:
        self.clones, self.running, self.seen = clones, False, dict[str, Tensor]()


class _Tap:
    """A forward hook; an object and no closure, so that deepcopy makes it write to the copy's tape."""

    def __init__(self, layer: str, tape: _Tape) -> None:
        self.layer, self.tape = layer, tape

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> Tensor | None:
        if not self.tape.running:
            return None
        if not isinstance(output, Tensor):
            raise UserError(f"layer {self.layer!r} gives {type(output).__name__}, not a tensor: tap another")
        self.tape.seen[self.layer] = output
        return output.clone() if self.tape.clones else None


class _InputTap:
    """As `_Tap`, before the module runs."""

    def __init__(self, layer: str, tape: _Tape) -> None:
        self.layer, self.tape = layer, tape

    def __call__(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.tape.running:
            self.tape.seen[self.layer] = args[0]


def _body(net: nn.Module) -> nn.Module:
    return net.net if isinstance(net, Normalized) else net


def _linear_layers(net: nn.Module) -> list[nn.Linear]:
    return [module for module in net.modules() if isinstance(module, nn.Linear)]


def _stages(net: nn.Module) -> tuple[str, ...]:
    stages = getattr(_body(net), "stages", ())
    return stages if isinstance(stages, tuple) else ()  # ConvNeXt, for one, has modules of this name
