"""A user's network: imported as `package.module:function`, and tried on one image."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from advalign.errors import UserError, quoted, require, shorten, unknown
from advalign.models.adapted import number_type
from advalign.models.modes import evaluating

# What torchvision, timm and others call the sizes.
_NAMES = {"classes": ("num_classes", "n_classes"), "channels": ("in_channels", "in_chans")}


def find_function(module: str, name: str) -> Callable[..., Any]:
    """Import a function, or a class, with the current directory on the path, as `python -m` does.

    Raises:
        UserError: the module cannot be imported, is named as a file, or has no such function.
    """
    as_path = module.removesuffix(".py").replace("/", ".")
    require(not module.endswith(".py"), lambda: f"{quoted(module)} is a file: name the module, {as_path}:{name}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        imported = importlib.import_module(module)
    except Exception as error:
        raise UserError(
            f"cannot import {quoted(module)} from the current directory or the path: {_line(error)}"
        ) from error
    callables = {key: value for key, value in vars(imported).items() if callable(value)}
    if name not in callables:
        raise unknown(f"function of {shorten(module)}", name, _defined_in(module, callables))
    return callables[name]


def call_function(spelling: str, make: Callable[..., Any], arguments: dict[str, Any], **sizes: Any) -> nn.Module:
    """Call a user's function with the arguments that are spelled, and with those of the sizes that it accepts.

    Sizes have the names that functions of other libraries have for them, too. One that takes any argument is called as
    theirs are if it does not know ours.

    Raises:
        UserError: it fails, or returns something else than a network.
    """
    parameters = inspect.signature(make).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = {}
    for size, value in sizes.items():
        names = (size, *_NAMES.get(size, ()))
        taken = next((name for name in names if name in parameters), size if takes_any else None)
        if taken is not None and not arguments.keys() & set(names):
            accepted[taken] = value
    try:
        net = _call_as_others(make, arguments, accepted) if takes_any else make(**arguments, **accepted)
    except Exception as error:
        raise UserError(f"model {quoted(spelling)} cannot be built: {_line(error)}") from error
    require(
        isinstance(net, nn.Module),
        lambda: f"model {quoted(spelling)} returns {type(net).__name__}, not a torch.nn.Module",
    )
    return net


def _call_as_others(make: Callable[..., Any], arguments: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """Call a function that hands any argument on: with our sizes or else, as torchvision's, with `num_classes`."""
    try:
        return make(**arguments, **sizes)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        return make(**arguments, **({"num_classes": sizes["classes"]} if "classes" in sizes else {}))


def check_output(net: nn.Module, shape: tuple[int, int, int], classes: int) -> None:
    """Run one black image (C, H, W) in eval mode and look at the logits.

    Raises:
        UserError: the network fails on it, or does not give one logit for each class.
    """
    device = next((tensor.device for tensor in net.parameters()), None)
    try:
        with evaluating(net), torch.no_grad():
            logits = net(torch.zeros(1, *shape, device=device, dtype=number_type(net)))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model fails on an image of shape {shape}: {_line(error)}") from error
    if not isinstance(logits, Tensor):
        raise UserError(f"the model gives {type(logits).__name__}, not a tensor of logits")
    require(
        logits.ndim == 2, lambda: f"the model gives a tensor of shape {tuple(logits.shape)}, not logits (1, {classes})"
    )
    count = logits.shape[1]
    require(
        count == classes, lambda: f"wrong number of classes: model gives {count} logits, data has {classes} classes"
    )


def _defined_in(module: str, callables: dict[str, Any]) -> list[str]:
    return [name for name, value in callables.items() if getattr(value, "__module__", "") == module]


def _line(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {error}".splitlines()[0])
