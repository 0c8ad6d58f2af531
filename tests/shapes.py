"""How the shapes that signatures state are checked under test; users pay nothing."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from inspect import isclass
from typing import Any, get_args

import beartype
import jaxtyping
import torch
from torch import fx

PACKAGES = [f"advalign.{room}" for room in ("threats", "attacks", "objectives", "models", "data")]
_CALLS_CHECKED = 4
_calls: Counter[str] = Counter()


def install() -> None:
    """Check the shapes of modules that are imported from now on.

    Functions that state none are left as they are: the hook would wrap them too, which takes time, and hides
    generators from the compiler.
    """
    jaxtyped = jaxtyping.jaxtyped

    def where_shapes_are_stated(*, typechecker: Any) -> Callable[[Any], Any]:
        def checked_unless_compiled(each: Any) -> Any:
            if not _states_shapes(each):
                return each
            checked = jaxtyped(each, typechecker=typechecker)

            name = f"{each.__module__}.{each.__qualname__}"

            @functools.wraps(each)
            def call(*args: Any, **kwargs: Any) -> Any:
                if torch.compiler.is_compiling():  # the compiler's tensors are none to the checker
                    return each(*args, **kwargs)
                _calls[name] += 1
                return (checked if _calls[name] <= _CALLS_CHECKED else each)(*args, **kwargs)

            return call

        return checked_unless_compiled

    setattr(jaxtyping, "jaxtyped", where_shapes_are_stated)  # noqa: B010 (to pyright it is a constant)
    jaxtyping.install_import_hook(PACKAGES, "tests.shapes.check")


def begin_test() -> None:
    """Check each function's first calls again: in a test's hundredth step the shapes are those of the first few."""
    _calls.clear()


def check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments and the result of a function that state a shape, and no others.

    Others are for the library to refuse, by a `UserError` that tests look at, and for pyright. The symbols with which
    torch.fx traces a network have no shape.
    """
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _is_shape(hint)}
    checked = beartype.beartype(function)

    @functools.wraps(function)
    def checked_unless_traced(*args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values()))
        return function(*args, **kwargs) if traced else checked(*args, **kwargs)

    return checked_unless_traced


def _states_shapes(function: Any) -> bool:
    return not isclass(function) and any(_is_shape(_read(hint, function)) for hint in function.__annotations__.values())


def _read(hint: Any, function: Any) -> Any:
    try:
        return eval(hint, function.__globals__) if isinstance(hint, str) else hint
    except NameError:  # of an import for the type checker alone
        return None


def _is_shape(hint: Any) -> bool:
    return (isclass(hint) and issubclass(hint, jaxtyping.AbstractArray)) or any(map(_is_shape, get_args(hint)))
