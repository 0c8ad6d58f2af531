"""The user's own methods and attacks: a class `package.module:Class` becomes known to `parse` by its name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from advalign.attacks import ATTACKS, Attack, Quantized
from advalign.attacks.spelled import RESERVED, rename_attacks
from advalign.errors import UserError, quoted, require, shorten
from advalign.models.user import find_function
from advalign.objectives import BASES, PLUGINS, Base, PlugIn
from advalign.objectives.method import Part
from advalign.runtime.files import digest
from advalign.threats import Linf

# By the class that a user's class is derived from: its registry, and the arguments of a first instance.
_KINDS: tuple[tuple[type, dict[str, Any], tuple[object, ...]], ...] = (
    (Base, BASES, ()),
    (PlugIn, PLUGINS, ()),
    (Attack, ATTACKS, (Linf(),)),
)


def register(spelling: str) -> str:
    """Make a user's plug-in, base or attack, `package.module:Class`, known to `parse` under its name.

    Returns:
        The name.

    Raises:
        UserError: it cannot be imported, is none of these, has an argument without default, or a name already taken.
    """
    module, colon, name = spelling.partition(":")
    require(bool(colon), lambda: f"{quoted(spelling)} must be package.module:Class")
    part: Any = find_function(module, name)
    kind = next((each for each in _KINDS if isinstance(part, type) and issubclass(part, each[0])), None)
    if kind is None:
        raise UserError(f"{spelling} must be a class derived from advalign.PlugIn, advalign.Base or advalign.Attack")
    _, registry, arguments = kind
    _instantiate(spelling, part, arguments)
    plain = isinstance(part.name, str) and re.fullmatch(r"[A-Za-z][A-Za-z0-9]*(-[A-Za-z0-9]+)*", part.name)
    require(bool(plain), lambda: f"{spelling} is called {part.name!r}: a name is letters and digits, joined by hyphens")
    taken = ({**ATTACKS, **dict.fromkeys(RESERVED)} if registry is ATTACKS else BASES | PLUGINS).get(part.name, part)
    by = f"{taken.__module__}:{taken.__name__}" if taken else f"the word {part.name!r} of evaluations"
    require(taken is part, lambda: f"{spelling} is called {part.name!r}, as {by} is: rename it")
    registry[part.name] = part
    return part.name


def _instantiate(spelling: str, part: Any, arguments: tuple[object, ...]) -> None:
    """Make one instance with default arguments, so that a class that cannot be spelled is refused early."""
    try:
        made = part(*arguments)
        initialised = isinstance(made, Attack) or "_modules" in vars(made)
        require(initialised, lambda: f"{spelling} must call super().__init__() first")
        str(made)
    except UserError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        line = shorten(f"{type(error).__name__}: {error}".splitlines()[0])
        raise UserError(f"{spelling} cannot be made without arguments: {line}") from error


def register_attacks(spelling: str) -> str:
    """Make the attacks known that a spelling names by their file, and return it with the attacks' names instead.

    `my_file:MyAttack(steps=5)` becomes `my-attack(steps=5)`; so do the members of a worst case. This is for spellings
    that the user has typed: those in files are data, and must not run a program.

    Raises:
        UserError: as `register`.
    """
    return rename_attacks(spelling, lambda name: register(name) if ":" in name else name)


def source_digests(parts: Iterable[Part | Attack]) -> dict[str, str]:
    """Return, by name, a digest of the source file of each part that is the user's own: it may change under one name.

    The library's own parts have none, since their names identify them. An attack's members count as well.
    """
    members = [each for part in parts for each in (part, *(part.members if isinstance(part, Attack) else ()))]
    members += [each.inner for each in members if isinstance(each, Quantized)]
    classes = {part.name: type(part) for part in members if not type(part).__module__.startswith("advalign.")}
    return {name: digest(_source(kind), digits=10) for name, kind in classes.items()}


def _source(kind: type) -> bytes:
    """Return the file in which a class is written or, of one that is in no file, its qualified name."""
    try:
        return Path(inspect.getsourcefile(kind) or "").read_bytes()
    except (OSError, TypeError):  # typed into a shell or a notebook
        return f"{kind.__module__}:{kind.__qualname__}".encode()
