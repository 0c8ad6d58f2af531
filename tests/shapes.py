"""How the shapes that signatures state are checked under test; users pay nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from inspect import isclass
from typing import Any, get_args

import beartype
from jaxtyping import AbstractArray, install_import_hook
from torch import fx

PACKAGES = [f"advalign.{room}" for room in ("threats", "attacks", "objectives", "models", "data")]


def install() -> None:
    """Check the shapes of modules that are imported from now on."""
    install_import_hook(PACKAGES, "tests.shapes.check")


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of a function that state a shape, and no others.

    Others are for the library to refuse, by a `UserError` that tests look at, and for pyright. The symbols with which
    torch.fx traces a network have no shape.
    """
    shapes = {name: hint for name, hint in function.__annotations__.items() if _states_shape(hint)}
    if not shapes:
        return function
    function.__annotations__ = shapes
    checked = beartype.beartype(function)

    @functools.wraps(function)
    def checked_unless_traced(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
        return function(*args, **kwargs) if traced else checked(*args, **kwargs)

    return checked_unless_traced


def _states_shape(hint: Any) -> bool:
    return (isclass(hint) and issubclass(hint, AbstractArray)) or any(map(_states_shape, get_args(hint)))
