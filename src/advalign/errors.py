"""The ways a command ends early: what the user typed cannot be done, or not now, or a training run broke down."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from reprlib import Repr

SHOWN = 200
"""Characters at most that a message shows of a text which the user has written."""


class UserError(ValueError):
    """Bad input. One line that names the value, what was allowed and the nearest valid name; exit code 2."""


class Busy(UserError):
    """Another process is at it; later the same can be done."""


class TrainingError(RuntimeError):
    """A run that cannot go on (a loss that is not finite); the last good checkpoint is kept. Exit code 1."""


class RankLost(TrainingError):
    """Another process that trains the same run has died. Exit code 1."""


def shorten(text: str) -> str:
    """Return a text as it is; of one that is longer than a message shows, the beginning and the end."""
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 53]}...{text[-50:]}"


def quoted(value: object) -> str:
    """Return the `repr` of what the user has written, for a message; parts of it where it is long or nested."""
    return shorten(_REPR.repr(value))


class _Repr(Repr):
    """Looks at a bounded part of its argument: a few lines of YAML can stand for a list of a billion entries."""

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if x.bit_length() < 10_000 else f"<number of {x.bit_length()} bits>"


_REPR = _Repr()
_REPR.maxstring = _REPR.maxother = SHOWN
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 100
_REPR.maxlevel = 2


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not among the known ones, with the nearest of them."""
    known = sorted(known)
    near = get_close_matches(name[:SHOWN].lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {quoted(name)}: {hint}choose from {', '.join(known)}")


def nearly_alike(names: Iterable[str], known: Iterable[str]) -> str:
    """Return a hint, as the end of a message, on the first name that differs from a known one in case or spaces."""
    plain = {plain_name(each): each for each in known}
    pairs = ((name, plain[plain_name(name)]) for name in names if plain_name(name) in plain)
    hints = (f"; is {quoted(name)} meant as {quoted(other)}? names count to the letter" for name, other in pairs)
    return next(hints, "")


def plain_name(name: str) -> str:
    """Return a name in lower case, with one space for spaces, hyphens and underscores between its words."""
    return re.sub(r"(?<=\w)[\s_-]+(?=\w)", " ", name.strip()).casefold()


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise `UserError(message)` unless the condition holds; a function makes the message only when it is needed."""
    if not condition:
        raise UserError(message if isinstance(message, str) else message())
