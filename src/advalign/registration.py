"""Methods and attacks of one's own, made known by name: a class in a file of the user's, `package.module:Class`."""

from __future__ import annotations

import re
from typing import Any

from advalign.attacks import ATTACKS, Attack
from advalign.attacks.names import parse_name
from advalign.errors import UserError, require
from advalign.models.user import find_function
from advalign.objectives import BASES, PLUGINS, Base, PlugIn
from advalign.threats import Linf

# By the class that a part of one's own is derived from: where it is looked up, and how it is made on trial.
_KINDS: tuple[tuple[type, dict[str, Any], tuple[object, ...]], ...] = (
    (Base, BASES, ()),
    (PlugIn, PLUGINS, ()),
    (Attack, ATTACKS, (Linf(),)),
)
_RESERVED = ("worst", "transfer", "clean", "none", "standard")  # what records and the command line mean by these


def register(spelling: str) -> str:
    """Make a plug-in, base or attack of one's own, `package.module:Class`, known to `parse` under its name.

    Returns:
        The name.

    Raises:
        UserError: it cannot be imported, is none of these, has an argument without default, or the name of another.
    """
    module, colon, name = spelling.partition(":")
    require(bool(colon), lambda: f"{spelling!r} must be package.module:Class")
    part: Any = find_function(module, name)
    kind = next((each for each in _KINDS if isinstance(part, type) and issubclass(part, each[0])), None)
    if kind is None:
        raise UserError(f"{spelling} must be a class derived from advalign.PlugIn, advalign.Base or advalign.Attack")
    _, registry, arguments = kind
    try:
        made = part(*arguments)
        called = isinstance(made, Attack) or "_modules" in vars(made)
        require(called, lambda: f"{spelling} must call super().__init__() first")
        str(made)
    except UserError:
        raise
    except Exception as error:  # somebody's constructor may raise anything
        line = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{spelling} cannot be made without arguments: {line}") from error
    plain = isinstance(part.name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)*", part.name)
    require(bool(plain), lambda: f"{spelling} is called {part.name!r}: a name is letters and digits, joined by hyphens")
    taken = ({**ATTACKS, **dict.fromkeys(_RESERVED)} if registry is ATTACKS else BASES | PLUGINS).get(part.name, part)
    by = f"{taken.__module__}:{taken.__name__}" if taken else f"the word {part.name!r} of evaluations"
    require(taken is part, lambda: f"{spelling} is called {part.name!r}, as {by} is: rename it")
    registry[part.name] = part
    return part.name


def register_attacks(spelling: str) -> str:
    """Make the attacks known that a spelling names by their file, and return it with their names in their place.

    `my_file:MyAttack(steps=5)` becomes `my-attack(steps=5)`; the members of a worst case as well. For spellings that
    the user has typed: those in files are data, and name no program.

    Raises:
        UserError: as `register`.
    """
    name = parse_name(spelling)
    if name.is_worst_case:
        return f"worst({', '.join(map(register_attacks, name.members))})"
    head, bracket, arguments = spelling.partition("(")
    return f"{register(head.strip())}{bracket}{arguments}" if ":" in head else spelling
