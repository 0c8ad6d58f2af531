"""For a while: eval mode, parameters that do not learn, buffers that come back, gradients where the caller has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from advalign.errors import require
from advalign.runtime.threads import TURN


def check_parameters(net: nn.Module) -> None:
    """Refuse a network with parameters through which no gradient can flow.

    Raises:
        UserError: they were made in `torch.inference_mode()`, or are those of a lazy module that has not run.
    """
    for name, parameter in net.named_parameters():
        require(
            not is_lazy(parameter),
            lambda: f"the model's {name!r} has no shape yet: run the model once on a batch of images first",
        )
        require(
            not parameter.is_inference(),
            lambda: (
                f"the model's {name!r} was made in torch.inference_mode(), so that nothing can be derived through "
                "it: make or load the model outside"
            ),
        )


def outside_inference_mode() -> AbstractContextManager[object]:
    """Leave the caller's `torch.inference_mode()`, if there is one, in which there are no gradients.

    Images that were made in it have to be cloned inside.
    """
    # Only then, since to leave it switches gradients on, which a caller's no_grad() has switched off.
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    """No trainable parameter inside, and each parameter's own flag afterwards.

    Frozen parameters stay out of the attack's graph: 1.0 to 1.03 times faster in eager mode, 1.6 times when compiled.
    """
    flags = {parameter: parameter.requires_grad for parameter in net.parameters()}
    try:
        for parameter in flags:  # not requires_grad_ of the network, which TorchScript does not have
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, trainable in flags.items():
            parameter.requires_grad_(trainable)


@contextmanager
def training(net: nn.Module) -> Iterator[None]:
    """No trainable parameter and train mode inside; a network that trains already keeps the modes its owner has set.

    Raises:
        UserError: as `check_parameters`.
    """
    check_parameters(net)
    modes = {module: module.training for module in net.modules()}
    try:
        with frozen(net if net.training else net.train()):
            yield
    finally:
        for module, was in modes.items():
            module.training = was


@contextmanager
def evaluating(net: nn.Module) -> Iterator[list[str]]:
    """Eval mode and no trainable parameter inside; modes, flags and buffers as they were afterwards.

    Yields the names of the modules that were in train mode, `the model` for the network itself.

    Buffers too, for a forward may change them in eval mode: a count of its calls, or a norm that it puts in train mode.
    Other threads that evaluate, attack or train wait. A caller's `torch.inference_mode()` is left inside.

    Raises:
        UserError: as `check_parameters`.
    """
    check_parameters(net)
    with TURN, outside_inference_mode():
        modes = {module: module.training for module in net.modules()}
        in_train_mode = [name or "the model" for name, module in net.named_modules() if module.training]
        try:
            with buffers_kept(net), frozen(net.eval()):
                yield in_train_mode
        finally:
            for module, training in modes.items():
                module.training = training


@contextmanager
def setting(net: nn.Module, kind: type[nn.Module], attribute: str, value: object) -> Iterator[None]:
    """An attribute of every module of a kind has the value inside, and its own again afterwards."""
    before = {module: getattr(module, attribute) for module in net.modules() if isinstance(module, kind)}
    for module in before:
        setattr(module, attribute, value)
    try:
        yield
    finally:
        for module, was in before.items():
            setattr(module, attribute, was)


@contextmanager
def buffers_kept(net: nn.Module) -> Iterator[None]:
    """Give every buffer its value back afterwards: passes inside leave no trace in running statistics.

    Their gradients have to be taken inside as well: autograd notices buffers that change behind it.
    """
    registered = [  # a forward may put another tensor in its place; TorchScript's cannot be taken out
        (module, dict(module._buffers)) for module in net.modules() if not isinstance(module, torch.jit.ScriptModule)
    ]
    before = [(buffer, buffer._version, buffer.clone()) for buffer in net.buffers() if not buffer.is_inference()]
    try:
        _replace_inference_buffers(registered)
        yield
    finally:
        for module, buffers in registered:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, version, was in before:
                # Past autograd where it has seen no change: else a backward pass still to come would be refused.
                (buffer.data if buffer._version == version else buffer).copy_(was)


def _replace_inference_buffers(registered: list[tuple[nn.Module, dict[str, torch.Tensor | None]]]) -> None:
    """Put copies in place of buffers that a pass in `torch.inference_mode()` has left: no graph may hold those."""
    if torch.is_inference_mode_enabled():
        return
    for module, buffers in registered:
        for name, buffer in buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()
