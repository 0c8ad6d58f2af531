"""A study by its name, or of one's own: a YAML file, or a Python function that returns one."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from inspect import signature
from pathlib import Path
from typing import Any

from advalign.errors import UserError, require, unknown
from advalign.models import user
from advalign.objectives import parse
from advalign.runs.sources import require_builtin
from advalign.spelling import check_arguments, parse_number
from advalign.studies.paper import STUDIES
from advalign.studies.results import ROBUST, sweep, trade_off
from advalign.studies.scales import Scale
from advalign.studies.study import CLEAN, Cell, Column, Study
from advalign.training.recipes import RECIPES, Recipe

_KEYS = ("title", "data", "model", "recipe", "methods", "columns", "surrogate", "seeds", "figure")


def find_study(spelling: str, scale: Scale, trust_model: bool = False) -> Study:
    """Return the study of a name, of a `.yaml` file, of the function `study` in a `.py` file, or of `module:function`.

    A function is called with the scale, whose recipe, networks and columns it may use. It is a program of the user's;
    a YAML file is data, and a function that it names as a network is called only with `trust_model`.

    Raises:
        UserError: there is none, or it is not well-formed.
    """
    if spelling in STUDIES:
        return STUDIES[spelling](scale)
    path = Path(spelling)
    if path.suffix in (".yaml", ".yml"):
        return _from_yaml(path, scale, trust_model)
    module, colon, function = spelling.rpartition(":")
    if path.suffix == ".py":
        make = _function_of(path)
    elif colon:
        make = user.find_function(module, function)
    else:
        raise unknown("study", spelling, STUDIES)
    try:
        made = make(scale)
    except UserError:
        raise
    except Exception as error:  # somebody's function may raise anything
        raise UserError(f"{spelling}: study(scale) raised {type(error).__name__}: {error}".splitlines()[0]) from error
    require(isinstance(made, Study), lambda: f"{spelling} returns {type(made).__name__}, not an advalign.studies.Study")
    return replace(made, declared=path.read_text()) if path.suffix == ".py" else made


def _function_of(path: Path) -> Callable[[Scale], Any]:
    require(path.is_file(), lambda: f"no such file: {str(path)!r}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # somebody's file may raise anything
        raise UserError(f"cannot read {path}: {type(error).__name__}: {error}".splitlines()[0]) from error
    require(callable(getattr(module, "study", None)), lambda: f"{path} has no function study(scale)")
    return module.study


def _from_yaml(path: Path, scale: Scale, trust_model: bool) -> Study:
    import yaml

    try:
        text = path.read_text()
        content = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    given = _mapping(content, "a study", _KEYS)
    for key in ("data", "methods"):
        require(key in given, lambda: f"{path} has no {key}")
    surrogate = given.get("surrogate", {"method": "natural", "model": scale.large})
    for each in (given, surrogate, *_list(given["methods"], "methods")):
        if not trust_model and isinstance(each, dict) and "model" in each:
            require_builtin(str(each["model"]), path)
    common = {
        "data": given["data"],
        "model": given.get("model", scale.model),
        "recipe": _recipe(given.get("recipe", {}), scale.recipe),
    }
    cells = [_cell(each, common) for each in _list(given["methods"], "methods")]
    columns = [_column(each) for each in _list(given["columns"], "columns")] if "columns" in given else scale.columns()
    headings = {column.heading for column in columns}
    drawn = "figure" not in given or {CLEAN, ROBUST} <= headings
    require(
        drawn, lambda: f"{path}: a figure needs the columns {CLEAN!r} and {ROBUST!r}, and there are {sorted(headings)}"
    )
    seeds = given.get("seeds", scale.seeds)
    require(type(seeds) is int, lambda: f"seeds={seeds!r} must be a whole number")
    return Study(
        name=path.stem,
        title=f"{given.get('title', path.stem)}, scale {scale.name}",
        cells=tuple(cells),
        columns=tuple(columns),
        seeds=seeds,
        surrogate=_cell(surrogate, common) if any(column.black_box for column in columns) else None,
        figures=_figures(given.get("figure"), cells),
        declared=text,
    )


def _cell(given: Any, common: Mapping[str, Any]) -> Cell:
    """Read a method, or a mapping with one and what is its own; of the recipe, what it changes."""
    given = {"method": given} if isinstance(given, str) else _mapping(given, "methods", _names(Cell))
    require("method" in given, lambda: f"an entry of methods has no method: {given}")
    given = {"row": given["method"], **given}  # as it is spelled there, with defaults that are named
    recipe = _recipe(given.get("recipe", {}), common["recipe"])
    return Cell(**check_arguments("methods", Cell, {**common, **given, "recipe": recipe}))


def _column(given: Any) -> Column:
    """Read an attack, which is its own heading, or a mapping."""
    given = {"attack": given} if isinstance(given, str) else _mapping(given, "columns", _names(Column))
    heading = given.get("attack", CLEAN)
    return Column(**check_arguments("columns", Column, {"heading": heading, **given}))


def _recipe(given: Any, default: Recipe) -> Recipe:
    """Read a preset's name, or a mapping of changes, to a `preset` if it names one."""
    known = ("preset", *_names(Recipe))
    given = {"preset": given} if isinstance(given, str) else _mapping(given, "recipe", known)
    require("seed" not in given, "recipe: the seeds are the study's: say how many with `seeds`")
    name = given.pop("preset", None)
    if name is not None and (not isinstance(name, str) or name not in RECIPES):
        raise unknown("recipe", str(name), RECIPES)
    return replace(default if name is None else RECIPES[name](), **{k: _value(v) for k, v in given.items()})


def _value(value: Any) -> Any:
    """Read what YAML has no word for: a number such as 8/255 or 1e-3, a tuple."""
    if isinstance(value, str) and value[:1].isdigit():
        return parse_number(value)
    return tuple(value) if isinstance(value, list) else value


def _figures(given: Any, cells: Iterable[Cell]) -> tuple[Any, ...]:
    """Read `trade-off`, or the name of the argument that the cells' `at` are values of."""
    if given is None:
        return ()
    parts = [type(part) for cell in cells for part in parse(cell.method).parts]
    arguments = {name for part in parts for name in signature(part).parameters}
    if given not in (known := ("trade-off", *sorted(arguments), *_names(Recipe))):
        raise unknown("figure", str(given), known)
    return (trade_off,) if given == "trade-off" else (sweep(given), trade_off)


def _mapping(given: Any, what: str, known: Iterable[str]) -> dict[str, Any]:
    require(isinstance(given, dict), lambda: f"{what}: {given!r} must be a mapping")
    for key in given:
        if key not in known:
            raise unknown(f"key of {what}", str(key), known)
    return dict(given)


def _list(given: Any, what: str) -> list[Any]:
    require(isinstance(given, list), lambda: f"{what}: {given!r} must be a list")
    return given


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]
