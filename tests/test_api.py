"""The page of Python names describes every public name, and no name that is not there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import advalign

PAGE = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
DIRECTIVES = re.findall(r"^::: (\S+)$", PAGE, re.MULTILINE)


def named(name: str) -> object:
    """What a dotted name names: a module, or something in it."""
    module, _, last = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ImportError:
        return getattr(importlib.import_module(module), last)


@pytest.mark.parametrize("name", DIRECTIVES)
def test_every_name_on_the_page_is_there_and_described(name: str):
    assert (named(name).__doc__ or "").strip().splitlines()[0].endswith((".", ":"))


def test_every_public_name_is_on_the_page():
    modules = {"attacks", "data", "models"}  # whose own names are listed
    described = [named(name) for name in DIRECTIVES]
    assert len(described) == len(set(DIRECTIVES)) > 80
    missing = [name for name in advalign.__all__ if name not in modules and getattr(advalign, name) not in described]
    assert not missing


@pytest.mark.parametrize("module", ["attacks", "data"])
def test_every_public_class_and_function_of_the_public_modules_is_on_the_page(module: str):
    described = [named(name) for name in DIRECTIVES]
    content = importlib.import_module(f"advalign.{module}")
    public = {name: getattr(content, name) for name in content.__all__}
    missing = [name for name, thing in public.items() if callable(thing) and thing not in described]
    assert not missing
