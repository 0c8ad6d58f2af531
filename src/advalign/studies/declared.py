"""The user's own studies: a YAML file, or a Python function that returns one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from advalign.errors import UserError, quoted, require, shorten, unknown
from advalign.models import user
from advalign.objectives import parse
from advalign.runs.sources import require_builtin
from advalign.runtime.files import read_content
from advalign.runtime.near import near_path
from advalign.spelling import check_arguments, parse_number
from advalign.studies.cells import CLEAN, Cell, Column
from advalign.studies.figures import ROBUST, sweep_section, trade_off_section
from advalign.studies.scales import Scale
from advalign.studies.study import FigureBuilder, Study
from advalign.training.recipes import RECIPES, Recipe

_LONGEST = 250_000  # bytes of a file
_MOST_ENTRIES = 50_000  # of all lists and mappings; an alias counts as what it stands for
_DEEPEST = 10  # lists and mappings inside one another
_KEYS = ("title", "data", "model", "recipe", "methods", "columns", "surrogate", "seeds", "figure")


def study_of_function(spelling: str, scale: Scale) -> Study:
    """Return the study of `module:function`.

    Raises:
        UserError: there is no such function, it raises an exception, or returns something else.
    """
    module, _, function = spelling.rpartition(":")
    return _called(spelling, user.find_function(module, function), scale)


def read_python(path: Path, scale: Scale) -> Study:
    """Return the study of the function `study` in a Python file.

    Raises:
        UserError: the file cannot be read, has no such function, or the function raises an exception or returns
            something else.
    """
    require(path.is_file(), lambda: f"no such file: {str(path)!r}{near_path(path)}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's file may raise anything
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}".splitlines()[0]) from error
    require(callable(getattr(module, "study", None)), lambda: f"{path} has no function study(scale)")
    return replace(_called(str(path), module.study, scale), declared=path.read_text())


def _called(spelling: str, make: Callable[[Scale], Any], scale: Scale) -> Study:
    try:
        study = make(scale)
    except UserError:
        raise
    except Exception as error:  # the user's function may raise anything
        raise UserError(f"{spelling}: study(scale) raised {type(error).__name__}: {error}".splitlines()[0]) from error
    require(
        isinstance(study, Study), lambda: f"{spelling} returns {type(study).__name__}, not an advalign.studies.Study"
    )
    return study


def read_yaml(path: Path, scale: Scale, trust_model: bool) -> Study:
    """Return the study of a YAML file; what the file leaves out is the scale's.

    Raises:
        UserError: the file cannot be read, a key or value is unknown, or a network is a function and `trust_model` is
            not set.
    """
    try:
        size = path.stat().st_size
        require(size <= _LONGEST, lambda: f"cannot read {path}: it has {size} bytes, and {_LONGEST} are allowed")
        text = read_content(path).decode()
        content = _parsed(text)
    except UserError:
        raise
    except Exception as error:  # PyYAML's constructors raise anything; a RecursionError where entries nest deeply
        raise UserError(f"cannot read {path}: {shorten(' '.join(str(error).split()))}") from None
    _check_nesting(content, path)
    content = _mapping(content, "a study", _KEYS)
    for key in ("data", "methods"):
        require(key in content, lambda: f"{path} has no {key}")
    surrogate = content.get("surrogate", {"method": "natural", "model": scale.large})
    for entry in (content, surrogate, *_list(content["methods"], "methods")):
        if not trust_model and isinstance(entry, dict) and "model" in entry:
            require_builtin(str(entry["model"]), path)
    common = {
        "data": content["data"],
        "model": content.get("model", scale.model),
        "recipe": _recipe(content.get("recipe", {}), scale.recipe),
    }
    cells = [_cell(entry, common) for entry in _list(content["methods"], "methods")]
    columns = scale.columns()
    if "columns" in content:
        columns = tuple(_column(entry) for entry in _list(content["columns"], "columns"))
    headings = {column.heading for column in columns}
    require(
        "figure" not in content or {CLEAN, ROBUST} <= headings,
        lambda: (
            f"{path}: a figure needs the columns {CLEAN!r} and {ROBUST!r}, and there are {quoted(sorted(headings))}"
        ),
    )
    seeds = content.get("seeds", scale.seeds)
    require(type(seeds) is int, lambda: f"seeds={quoted(seeds)} must be a whole number")
    return Study(
        name=path.stem,
        title=f"{content.get('title', path.stem)}, scale {scale.name}",
        cells=tuple(cells),
        columns=columns,
        seeds=seeds,
        surrogate=_cell(surrogate, common) if any(column.black_box for column in columns) else None,
        figures=_figures(content.get("figure"), cells),
        declared=text,
    )


def _parsed(text: str) -> Any:
    """Return what YAML says, safely; as in YAML 1.2, 2:5:10 is a word, and not a number in base 60."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    for kind in ("int", "float"):
        read = getattr(Loader, f"construct_yaml_{kind}")
        Loader.add_constructor(
            f"tag:yaml.org,2002:{kind}",
            lambda loader, node, read=read: node.value if ":" in node.value else read(loader, node),
        )
    return yaml.load(text, Loader)


def _check_nesting(content: Any, path: Path) -> None:
    """Refuse what is too deep or too large, such as a list that contains itself or stands for a billion entries."""
    entries, level = 0, [content]
    for _ in range(_DEEPEST):
        level = [part for each in level for part in _parts(each)]
        entries += len(level)
        require(entries <= _MOST_ENTRIES, lambda: f"{path} has more than {_MOST_ENTRIES} entries")
    require(not level, lambda: f"{path} has lists or mappings nested more than {_DEEPEST} deep, or inside themselves")


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if isinstance(value, list | tuple | set) else []


def _cell(entry: Any, common: Mapping[str, Any]) -> Cell:
    """Read a method, or a mapping with a method and the cell's own settings; its recipe changes the common one."""
    entry = {"method": entry} if isinstance(entry, str) else _mapping(entry, "methods", _field_names(Cell))
    require("method" in entry, lambda: f"an entry of methods has no method: {quoted(entry)}")
    entry = {"row": entry["method"], **entry}  # as the file spells it, also with defaults
    recipe = _recipe(entry.get("recipe", {}), common["recipe"])
    return Cell(**check_arguments("methods", Cell, {**common, **entry, "recipe": recipe}))


def _column(entry: Any) -> Column:
    """Read an attack, which is its own heading, or a mapping."""
    entry = {"attack": entry} if isinstance(entry, str) else _mapping(entry, "columns", _field_names(Column))
    heading = entry.get("attack", CLEAN)
    return Column(**check_arguments("columns", Column, {"heading": heading, **entry}))


def _recipe(entry: Any, default: Recipe) -> Recipe:
    """Read a preset's name, or a mapping of changes to the preset that it names, or else to the default."""
    known = ("preset", *_field_names(Recipe))
    entry = {"preset": entry} if isinstance(entry, str) else _mapping(entry, "recipe", known)
    require("seed" not in entry, "recipe: the seeds are the study's: say how many with `seeds`")
    name = entry.pop("preset", None)
    if name is not None and (not isinstance(name, str) or name not in RECIPES):
        raise unknown("recipe", str(name), RECIPES)
    return replace(default if name is None else RECIPES[name](), **{k: _value(v) for k, v in entry.items()})


def _value(value: Any) -> Any:
    """Read a number that YAML takes for a word, such as 8/255 or 1e-3, and a list as a tuple."""
    if isinstance(value, str) and value[:1].isdigit() and ":" not in value:
        return parse_number(value)
    return tuple(value) if isinstance(value, list) else value


def _figures(name: Any, cells: Iterable[Cell]) -> tuple[FigureBuilder, ...]:
    """Read `trade-off`, or the name of the argument whose values the cells' `at` are."""
    if name is None:
        return ()
    parts = [type(part) for cell in cells for part in parse(cell.method).parts]
    arguments = {argument for part in parts for argument in signature(part).parameters}
    if name not in (known := ("trade-off", *sorted(arguments), *_field_names(Recipe))):
        raise unknown("figure", str(name), known)
    return (trade_off_section,) if name == "trade-off" else (sweep_section(name), trade_off_section)


def _mapping(entry: Any, kind: str, known: Iterable[str]) -> dict[str, Any]:
    require(isinstance(entry, dict), lambda: f"{kind}: {quoted(entry)} must be a mapping")
    for key in entry:
        if key not in known:
            raise unknown(f"key of {kind}", str(key), known)
    return dict(entry)


def _list(entry: Any, kind: str) -> list[Any]:
    require(isinstance(entry, list), lambda: f"{kind}: {quoted(entry)} must be a list")
    return entry


def _field_names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]
