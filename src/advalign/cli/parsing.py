"""From the words of a command line to options; of what tyro says about bad ones, the line that matters."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from contextlib import redirect_stderr, suppress
from functools import partial
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from advalign.errors import SHOWN, UserError, require, shorten
from advalign.spelling import parse_number, spell_number


def parse_options(options: type, program: str, arguments: list[str], **defaults: Any) -> Any:
    """Return the options that the words of a command line give; fractions such as 8/255 are numbers.

    Raises:
        UserError: what is wrong with them, in one line.
    """
    for before, word in zip(("", *arguments), arguments, strict=False):
        # None of the values may be empty, and many of them would count as not given.
        require(bool(word.strip()), lambda: f"{before or program} is followed by an empty word: name a value")
    registry = ConstructorRegistry()

    for kind, metavar, read, show in (
        (float, "NUMBER", parse_number, spell_number),
        (int, "INT", _whole_number, str),
    ):
        registry.primitive_rule(partial(_read_numbers, kind, metavar, read, show))

    def parse(words: list[str]) -> Any:
        return tyro.cli(options, prog=program, args=words, registry=registry, **defaults)

    shown = io.StringIO()
    try:
        with redirect_stderr(shown):
            return parse(arguments)
    except SystemExit as end:
        if not end.code:
            raise
    if any(len(word) > SHOWN for word in arguments):  # which the box would break into many lines
        shown = io.StringIO()
        with suppress(SystemExit), redirect_stderr(shown):
            parse([shorten(word) for word in arguments])
    raise UserError(f"{_one_line(shown.getvalue())}; see {program} --help")


def _read_numbers(
    kind: type, metavar: str, read: Callable[[str], Any], show: Callable[[Any], str], info: PrimitiveTypeInfo
) -> PrimitiveConstructorSpec[Any] | None:
    """Tell tyro how to read one kind of number; None for other types, as a rule of its registry."""
    if info.type is not kind:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, kind | int),
        str_from_instance=lambda value: [show(value)],
    )


def _whole_number(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise UserError(f"{word!r} is not {_KINDS['INT']}") from None


_LONGEST = 1000  # characters of a message, which may list all choices, and repeats all words that fit nothing

# tyro's message about an option that may be left out.
_OPTIONAL = re.compile(
    r"Error parsing (\S+): no type matching \{None\}\|(NUMBER|INT) could be instantiated from \['(.*)'\]"
)
# tyro's message about an option of several numbers.
_SEVERAL = re.compile(r"Error parsing (\S+): Could not find valid parse for arguments: \[(.*)\]")
_KINDS = {"NUMBER": "a number: write a decimal or a fraction, as in 8/255", "INT": "a whole number"}


def _one_line(box: str) -> str:
    """Return the text above the first rule of tyro's message box, and the option that it suggests."""
    lines = [line.strip(" │|") for line in box.splitlines()]
    texts = ["" if re.fullmatch(r"[^\w]*[─-]{8,}[^\w]*", line) else line for line in lines]
    texts = texts[1 if lines[0][:1] in "╭─" else 2 :]  # without the title, which on plain terminals has a rule below it
    message = " ".join(texts[: texts.index("")])
    message = _OPTIONAL.sub(lambda match: f"{match[1]}: {match[3]!r} is not {_KINDS[match[2]]}", message)
    message = _SEVERAL.sub(r"\1: \2 are not numbers: write decimals or fractions, with spaces between", message)
    message = message.removeprefix("Error parsing ")
    near = next((text.split()[0] for text in texts if text.startswith("--")), "") if "Perhaps" in box else ""
    message = message.rstrip(".") + (f"; did you mean {near}?" if near else "")
    return message if len(message) <= _LONGEST else f"{message[: _LONGEST - 53]}...{message[-50:]}"
