"""What bad input is answered: the one line that matters of the box in which the parser of flags draws its message."""

from __future__ import annotations

import re

from advalign.errors import shorten

# tyro's message about an option that may be left out.
_OPTIONAL = re.compile(
    r"Error parsing (\S+): no type matching \{None\}\|(NUMBER|INT) could be instantiated from \['(.*)'\]"
)
_KINDS = {"NUMBER": "a number: write a decimal or a fraction, as in 8/255", "INT": "a whole number"}


def one_line(box: str) -> str:
    """Return the text above the first rule of tyro's message box, and the option that it suggests.

    What was typed, which the box repeats in full, is shortened.
    """
    lines = [line.strip(" │|") for line in box.splitlines()]
    texts = ["" if re.fullmatch(r"[^\w]*[─-]{8,}[^\w]*", line) else line for line in lines]
    texts = texts[1 if lines[0][:1] in "╭─" else 2 :]  # without the title, which on plain terminals has a rule below it
    message = " ".join(texts[: texts.index("")])
    message = _OPTIONAL.sub(lambda match: f"{match[1]}: {match[3]!r} is not {_KINDS[match[2]]}", message)
    near = next((text.split()[0] for text in texts if text.startswith("--")), "") if "Perhaps" in box else ""
    message = message.rstrip(".") + (f"; did you mean {near}?" if near else "")
    return " ".join(map(shorten, message.split(" ")))
