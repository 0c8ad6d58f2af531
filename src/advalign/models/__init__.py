"""Networks by name: `build("resnet18(width=16)", classes=10)`, or the user's, `build("my_nets:make", classes=10)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from advalign.errors import quoted, require, unknown
from advalign.models.averaged import Averaged
from advalign.models.bpda import bpda
from advalign.models.deepmind import DMPreActResNet, DMWideResNet
from advalign.models.fold import Folded
from advalign.models.mix import Mix
from advalign.models.modes import evaluating
from advalign.models.normalize import Normalized
from advalign.models.preact_resnet import PreActResNet
from advalign.models.resnet import resnet18, resnet34
from advalign.models.small_cnn import SmallCNN
from advalign.models.taps import Output, Tapped, find_layer, last_linear, last_stage, layers, named_layers
from advalign.models.user import call_function, check_output, find_function
from advalign.models.vgg import VGG16
from advalign.models.wide_resnet import wide_resnet, wide_resnet_28_10, wide_resnet_34_10
from advalign.spelling import check_arguments, check_numbers, parameters_of, parse_call, spell

__all__ = [
    "MODELS",
    "Averaged",
    "Folded",
    "Mix",
    "Normalized",
    "Output",
    "Tapped",
    "bpda",
    "build",
    "canonical",
    "check_output",
    "evaluating",
    "find_layer",
    "function_of",
    "last_linear",
    "last_stage",
    "layers",
    "named_layers",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "small-cnn": SmallCNN,
    "resnet18": resnet18,
    "resnet34": resnet34,
    "preact-resnet18": PreActResNet,
    "wide-resnet-28-10": wide_resnet_28_10,
    "wide-resnet-34-10": wide_resnet_34_10,
    "wide-resnet": wide_resnet,
    "dm-wide-resnet": DMWideResNet,
    "dm-preact-resnet18": DMPreActResNet,
    "vgg16": VGG16,
}


def _normalized(
    model: str, mean: tuple[float, ...], std: tuple[float, ...], *, classes: int, channels: int
) -> Normalized:
    require(
        len(mean) == channels, lambda: f"normalized: mean={mean} must have one value for each of {channels} channels"
    )
    return Normalized(build(model, classes=classes, channels=channels), mean, std)


def _mix(
    robust: str,
    accurate: str,
    weight: float,
    temperature: float = 1.0,
    transform: tuple[float, ...] = (),
    *,
    classes: int,
    channels: int,
) -> Mix:
    h, g = (build(spelling, classes=classes, channels=channels) for spelling in (robust, accurate))
    return Mix(h, g, weight, temperature, transform)


COMPOSED: dict[str, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    "normalized": (_normalized, ("model",)),
    "mix": (_mix, ("robust", "accurate")),
}
"""Networks made of others, and the arguments that spell these."""
_EXAMPLES = {
    "normalized": 'normalized(model="resnet18", mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))',
    "mix": 'mix(robust="resnet18", accurate="vgg16", weight=0.9)',
}


def build(spelling: str, *, classes: int, channels: int = 3) -> nn.Module:
    """Build the network that a string spells; it maps images (N, channels, H, W) to logits (N, classes).

    A user's network is spelled `package.module:function(argument=value)`; the function is called with `classes` and
    `channels` if it takes them. `check_output` checks whether the network fits the data. Networks are made of others by
    `normalized(model="resnet18", mean=(...), std=(...))` and `mix(robust="resnet18", accurate="vgg16", weight=0.9)`.

    Example:
        >>> import advalign as aa
        >>> net = aa.models.build("resnet18(width=16)", classes=10)

    Raises:
        UserError: unknown model or argument, a value out of range, or a function that cannot be imported or fails.
    """
    name, make, arguments = _resolve(spelling)
    if name in MODELS or name in COMPOSED:
        return make(**arguments, classes=classes, channels=channels)
    return call_function(spelling, make, arguments, classes=classes, channels=channels)


def canonical(spelling: str) -> str:
    """Spell a model in the one way that keys records: arguments in the constructor's order, defaults left out.

    Raises:
        UserError: as `build`.
    """
    name, make, arguments = _resolve(spelling)
    arguments |= {each: canonical(arguments[each]) for each in _members(name) if each in arguments}
    named = {parameter.name for parameter in parameters_of(make)}
    return spell(name, make, arguments, others={key: arguments[key] for key in arguments if key not in named})


def function_of(spelling: str) -> str:
    """Return the `package.module:function` that a spelling names, without arguments; empty for a built-in network.

    Of a network made of others, those of all of them, with commas between.
    """
    head = spelling.partition("(")[0]
    if ":" in head:
        return "".join(head.split())
    if not spelling:
        return ""
    call = parse_call(spelling)  # as `_resolve` does: to Python, (mix)(...) and other letters are the same name
    inside = (function_of(str(call.arguments[each])) for each in _members(call.name) if each in call.arguments)
    return ", ".join(filter(None, inside))


def _members(name: str) -> tuple[str, ...]:
    return COMPOSED[name][1] if name in COMPOSED else ()


def _resolve(spelling: str) -> tuple[str, Callable[..., nn.Module], dict[str, Any]]:
    head, parenthesis, tail = spelling.partition("(")
    module, colon, function = head.strip().rpartition(":")
    call = parse_call(f"{function}{parenthesis}{tail}")
    if colon:
        function = function.strip()
        name, make = f"{module}:{function}", find_function(module, function)
    elif call.name in MODELS:
        name, make = call.name, MODELS[call.name]
    elif call.name in COMPOSED:
        name, make = call.name, COMPOSED[call.name][0]
    else:
        require(
            not Path(f"{head.strip()}.py").is_file(),
            lambda: f"{head.strip()}.py may define several networks: name one, as in {head.strip()}:FUNCTION",
        )
        raise unknown("model", call.name, [*MODELS, *COMPOSED])
    given_by_data: dict[str, Any] = {"classes": None, "channels": None}
    check_numbers(f"model {quoted(name)}", call.arguments)
    arguments = check_arguments(f"model {quoted(name)}", make, call.arguments, hidden=given_by_data)
    if name in COMPOSED:
        for parameter in inspect.signature(make).parameters.values():
            missing = parameter.default is parameter.empty and parameter.name not in {**arguments, **given_by_data}
            require(
                not missing,
                lambda each=parameter.name: f"model {quoted(name)} needs its {each}, as in {_EXAMPLES[name]}",
            )
    return name, make, arguments
