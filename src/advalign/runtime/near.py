"""What a user may have meant by a path that leads nowhere."""

from __future__ import annotations

import os
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

_LOOKED_AT = 5000  # names in a folder among which a similar one is looked for
_SHOWN = 3


def near_path(path: Path | str) -> str:
    """Return a hint, as the end of a message on a path that leads nowhere: what lies there under a similar name.

    A name that others continue, as those of runs do with a digest, stands for them.
    """
    if os.path.exists(Path(path)):
        return ""
    found, *parts = Path(path).parts or (".",)
    if not Path(path).is_absolute():
        found, parts = "", [found, *parts]
    here = [Path(found)]
    for part in parts:
        here = [each for folder in here for each in _alike(folder, part)][:_SHOWN]
    return f"; did you mean {' or '.join(repr(str(each)) for each in here)}?" if here else ""


def _alike(folder: Path, name: str) -> list[Path]:
    """Return what lies in a folder under this name; else under one that begins so, or else under a similar one."""
    try:
        if name == ".." or (folder / name).exists():
            return [folder / name]
        names = sorted(entry.name for entry in islice(os.scandir(folder), _LOOKED_AT))
    except OSError:
        return []
    longer = [each for each in names if len(name) > 2 and each.startswith(name)]
    return [folder / each for each in longer or get_close_matches(name, names, n=1, cutoff=0.5)]
