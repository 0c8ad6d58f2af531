"""The ways a command ends early: what the user typed cannot be done, or not now, or a training run broke down."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. One line that names the value, what was allowed and the nearest valid name; exit code 2."""


class Busy(UserError):
    """Another process is at it; later the same can be done."""


class TrainingError(RuntimeError):
    """A run that cannot go on (a loss that is not finite); the last good checkpoint is kept. Exit code 1."""


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the known ones, with the nearest of them."""
    known = sorted(known)
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}choose from {', '.join(known)}")


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise `UserError(message)` unless the condition holds; a function makes the message only when it is needed."""
    if not condition:
        raise UserError(message if isinstance(message, str) else message())
