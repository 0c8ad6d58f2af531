"""The page of Python names lists names that are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import advalign

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text()


def _resolves(name: str) -> bool:
    home, _, last = name.rpartition(".")
    try:
        importlib.import_module(name)
    except ImportError:
        return hasattr(importlib.import_module(home), last)
    return True


def test_every_name_on_the_page_is_there():
    shown = re.findall(r"^\| `(\S+)` \| (.+) \|$", PAGE, re.M)
    names = [name.replace("aa.", "advalign.", 1) if name.startswith("aa.") else name for name, _ in shown]
    names += re.findall(r"^::: (\S+)$", PAGE, re.M)
    assert len(names) > 100
    for name in names:
        parts = name.split(".")
        thing = advalign
        if name.startswith("advalign.") and len(parts) == 2:
            assert hasattr(thing, parts[1]), name
        else:
            assert _resolves(name), name
    assert all(sentence.endswith((".", ":")) for _, sentence in shown)


def test_every_public_name_is_on_the_page():
    parts = {"attacks", "data", "models"}  # modules, whose own names are listed
    missing = [name for name in advalign.__all__ if name not in parts and f"`aa.{name}`" not in PAGE]
    assert not missing
