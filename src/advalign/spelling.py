"""One grammar for methods, attacks and models: `name(argument=value)`, joined by `+`.

`trades(beta=6)+vfd(weight=0.02)` is a command-line argument, the key of a record and the row of a table, so the
spelling of an object is canonical: arguments in the order of its constructor, defaults left out. Values are literals
and fractions such as `8/255`; nothing is ever evaluated.
"""

from __future__ import annotations

import ast
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from types import FunctionType, NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from advalign.errors import UserError, quoted, require, shorten, unknown

T = TypeVar("T")

LONGEST = 10_000
"""Characters at most of a spelling."""
DEEPEST = 20
"""Brackets at most inside one another."""
_LARGEST_FLOAT = 3.4028234663852886e38  # that fp32 holds; networks and losses compute in it
_LARGEST_INT = 2**63 - 1


class Call(NamedTuple):
    """A name and its keyword arguments, as spelled."""

    name: str
    arguments: dict[str, Any]


def parse_calls(text: str) -> list[Call]:
    """Parse `a(x=1)+b` into its calls.

    Raises:
        UserError: the text is not names with keyword arguments joined by `+`.
    """
    check_size(text)
    wrong = UserError(
        f"cannot read {quoted(text)}: write names joined by '+', as in 'trades(beta=6)+vfd(layer=\"layer4\")'"
    )
    opening, closing = (_QUOTED_OR_JOINED.sub("", text).count(bracket) for bracket in "()")
    if opening != closing:
        fault = "not closed" if opening > closing else "closed too often"
        raise UserError(f"cannot read {quoted(text)}: a bracket is {fault}")
    if "#" in _QUOTED_OR_JOINED.sub("", text):  # to Python the rest would be a comment
        raise wrong
    try:
        with warnings.catch_warnings(action="ignore"):  # of Python, about backslashes in quotes
            node = ast.parse(_joined_words(text.strip()), mode="eval").body
        return [_call(operand, wrong) for operand in _operands(node)]
    except UserError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise wrong from None


def check_size(text: str) -> None:
    """Refuse a spelling that is too long, or nested too deeply, to be one.

    Raises:
        UserError: the beginning of the text, and what is allowed.
    """
    require(
        len(text) <= LONGEST,
        lambda: f"cannot read {quoted(text)}: it has {len(text)} characters, and {LONGEST} are allowed",
    )
    depth = deepest = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    require(deepest <= DEEPEST, lambda: f"cannot read {quoted(text)}: at most {DEEPEST} brackets may be nested")


def parse_call(text: str) -> Call:
    """Parse exactly one call, such as `pgd(steps=20)`."""
    calls = parse_calls(text)
    if len(calls) != 1:
        raise UserError(f"cannot read {quoted(text)}: one name was expected, not {len(calls)} joined by '+'")
    return calls[0]


def parse_number(text: str) -> float:
    """Parse a decimal or a fraction: `0.03`, `8/255`.

    Raises:
        UserError: the text is neither.
    """
    wrong = UserError(f"{quoted(text)} is not a number: write a decimal or a fraction, as in 8/255")
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / float(denominator) if slash else float(text)
    except (ValueError, ZeroDivisionError):
        raise wrong from None
    if not math.isfinite(value):
        raise wrong
    return value


def spell_number(value: float) -> str:
    """Spell a number exactly and as short as that allows, since it keys records: `8/255`, `0.02`, `6`."""
    if value == int(value):
        return str(int(value))
    of_255 = round(value * 255)
    if len(repr(value)) > 6 and of_255 / 255 == value:
        return f"{of_255}/255"
    return repr(value)


def construct(what: str, call: Call, registry: Mapping[str, Callable[..., T]], **hidden: Any) -> T:
    """Construct the registered object a call names, its arguments checked against the constructor's annotations.

    Raises:
        UserError: unknown name or argument, or a value of the wrong type.
    """
    if call.name not in registry:
        raise unknown(what, call.name, registry)
    make = registry[call.name]
    return make(**check_arguments(f"{what} {call.name!r}", make, call.arguments, hidden=hidden), **hidden)


def check_arguments(
    owner: str, make: Callable[..., Any], arguments: Mapping[str, Any], hidden: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the arguments, converted where an int stands for a float or a word; refuse unknown names and wrong types.

    Raises:
        UserError: the name or the value, and what is allowed.
    """
    parameters = parameters_of(make)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters)
    named = [each.name for each in parameters if each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)]
    known = [name for name in named if name not in (hidden or {})]
    hints = _cached_hints(make) if isinstance(make, type | FunctionType) else _hints(make)
    checked = {}
    for name, value in arguments.items():
        if name not in known and (not takes_any or name in (hidden or {})):
            if not known:
                raise UserError(f"{owner} takes no arguments, but {quoted(name)} was given")
            raise unknown(f"argument of {owner}", name, known)
        hint = hints.get(name, Any)
        if type(value) is hint and (hint is not float or math.isfinite(value)):  # a study of many cells has millions
            checked[name] = value
            continue
        checked[name] = next((reading for reading in _readings(value) if _fits(reading, hint)), value)
        flag_for_number = isinstance(value, bool) and hint is not Any and _fits(2, hint)
        infinite = isinstance(value, float) and not math.isfinite(value)
        if isinstance(value, str) and not _fits(value, hint) and (choices := _choices(hint)):
            raise unknown(f"{name} of {owner}", value, choices)
        if flag_for_number or infinite or not _fits(checked[name], hint):
            raise UserError(f"{owner}: {name}={quoted(value)} must be {_readable(hint)}")
    return checked


def check_numbers(owner: str, arguments: Mapping[str, Any]) -> None:
    """Refuse numbers that tensors cannot hold, in which networks and losses compute.

    Raises:
        UserError: the number, and the largest that is allowed.
    """
    for name, value in arguments.items():
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, float) and not abs(each) <= _LARGEST_FLOAT:
                raise UserError(f"{owner}: {name}={quoted(value)} is out of range: at most 3.4e38, all that fp32 holds")
            if type(each) is int and abs(each) > _LARGEST_INT:
                raise UserError(f"{owner}: {name}={quoted(value)} is out of range: at most 2**63 - 1")


def parameters_of(make: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return what a constructor or a function takes; of those that stay, it is read once."""
    return (_cached_parameters if isinstance(make, type | FunctionType) else _parameters)(make)


def spell(
    name: str,
    make: Callable[..., Any],
    values: Mapping[str, Any],
    *,
    others: Mapping[str, Any] | None = None,
    hidden: str = "",
    always: str = "",
) -> str:
    """Spell a call by the values of its arguments, in the constructor's order; defaults are left out.

    Args:
        values: by name; what is missing, or is no argument, counts as default.
        others: of a function that takes any arguments, those that its signature does not name.
        hidden: the argument that is never spelled.
        always: the argument that is spelled even where it is the default.
    """
    shown = {}
    for parameter in parameters_of(make):
        value = values.get(parameter.name, parameter.default)
        if parameter.name != hidden and (value != parameter.default or parameter.name == always):
            shown[parameter.name] = value
    shown |= dict(sorted((others or {}).items()))
    return f"{name}({spell_arguments(shown)})" if shown else name


def spell_arguments(arguments: Mapping[str, Any]) -> str:
    """Spell arguments as they stand between the parentheses of a call."""
    return ", ".join(f"{name}={_spell_value(value)}" for name, value in arguments.items())


def _spell_value(value: Any) -> str:
    text = spell_number(value) if isinstance(value, float) else repr(value)
    return text if '"' in text else text.replace("'", '"')


_QUOTED_OR_JOINED = re.compile(
    r"""(?P<quoted>"[^"]*"|'[^']*')|(?P<before>(?:^|\+)\s*)?(?<![\w.])(?P<word>[A-Za-z_]\w*(?:[-.]\w+)+)(?P<argument>\s*=)?"""
)


def _joined_words(text: str) -> str:
    """Make Python of hyphens (small-cnn) and dots (layer4.1.conv2) in words; one that is a value is put in quotes."""

    def python(match: re.Match[str]) -> str:
        quoted, before, word, argument = match.group("quoted", "before", "word", "argument")
        if quoted:
            return quoted
        if before is None and argument is None:
            return f'"{word}"'
        return (before or "") + word.replace("-", "_") + (argument or "")

    return _QUOTED_OR_JOINED.sub(python, text)


def _operands(node: ast.expr) -> list[ast.expr]:
    """Return what is joined by `+`, in order."""
    operands: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        operands.append(node.right)
        node = node.left
    return [node, *reversed(operands)]


def _call(node: ast.expr, wrong: UserError) -> Call:
    if isinstance(node, ast.Name):
        return Call(node.id.replace("_", "-"), {})
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise wrong
    name = node.func.id.replace("_", "-")
    if node.args:
        given, example = name + ast.unparse(node).removeprefix(node.func.id), f"{shorten(name)}(NAME=VALUE)"
        raise UserError(f"cannot read {quoted(given)}: write an argument with its name, as in {example}")
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise wrong
        if keyword.arg in arguments:
            raise UserError(f"{shorten(name)}: {shorten(keyword.arg)} is given twice")
        arguments[keyword.arg] = _literal(keyword.value, name, keyword.arg)
    return Call(name, arguments)


def _literal(node: ast.expr, name: str, argument: str) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false"):
        return node.id == "true"
    if isinstance(node, ast.Tuple):
        return tuple(_literal(each, name, argument) for each in node.elts)
    if isinstance(node, ast.Name):  # layer=layer4 needs no quotes, which a shell would eat
        return node.id
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return parse_number(ast.unparse(node).replace(" ", ""))
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):  # TypeError: {[]: 1}
        text = shorten(f"{argument}={ast.unparse(node)}")
        raise UserError(f"{shorten(name)}: {text} is not a number, word or tuple") from None


def _hints(make: Callable[..., Any]) -> dict[str, Any]:
    """Return what the annotations say; nothing of a partial, or where a name is imported for the type checker alone."""
    try:
        if is_dataclass(make):  # each field in the names of the module that declares it
            return get_type_hints(make)
        return get_type_hints(make.__init__ if inspect.isclass(make) else make)
    except Exception:  # a user's annotations may be any expression
        return {}


def _parameters(make: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(make).parameters.values())


_cached_parameters = lru_cache(maxsize=1024)(_parameters)
_cached_hints = lru_cache(maxsize=1024)(_hints)  # to read them takes longer than all the rest of a check


def _fits(value: Any, hint: Any) -> bool:
    from beartype.door import is_bearable

    if isinstance(value, tuple) and get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        return all(is_bearable(each, get_args(hint)[0]) for each in value)  # beartype itself looks at one, at random
    return is_bearable(value, hint)


def _readings(value: Any) -> tuple[Any, ...]:
    """Return what a value may stand for: a whole number also for a float, in a tuple too, or for a word."""
    if type(value) is tuple:
        numbers = tuple(float(each) if _is_whole(each) else each for each in value)
        return value, numbers, tuple(str(each) if _is_whole(each) else each for each in value)
    return (value, float(value), str(value)) if _is_whole(value) else (value,)


def _is_whole(value: Any) -> bool:
    return type(value) is int and abs(value) <= sys.float_info.max


def _choices(hint: Any) -> list[str]:
    """Return the words that a `Literal`, or one in a union, allows."""
    return [str(word) for each in _members(hint) if get_origin(each) is Literal for word in get_args(each)]


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _readable(hint: Any) -> str:
    if len(members := _members(hint)) > 1:
        return " or ".join(_readable(each) for each in members if each is not NoneType)
    if choices := _choices(hint):
        return f"one of {', '.join(choices)}"
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        str: "a word, or text in quotes",
        bool: "true or false",
    }
    return words.get(hint, str(hint))
