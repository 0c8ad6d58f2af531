"""Write the lists of methods, attacks, recipes and options from the registries: `python docs/generate.py`.

Each stands between `<!-- generated: NAME -->` and `<!-- end of generated -->`; a test holds that they are current.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from tyro.conf import Positional

from advalign.attacks import ATTACKS, Attack, Quantized, Worst
from advalign.cli.commands import COMMANDS
from advalign.data import NAMES
from advalign.frontier.frontier import DIALS
from advalign.models import COMPOSED, MODELS
from advalign.objectives import BASES, PLUGINS
from advalign.spelling import spell_number
from advalign.studies import STUDIES
from advalign.threats import THREATS
from advalign.training.recipes import RECIPES, Recipe

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in (
    "index", "attacks", "recipes", "command-line", "api",
)))  # fmt: skip
_BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)
_PAGE_OF = {"contrast": "afa"}  # methods that share a page with another; the others have one of their own name


def choices() -> str:
    """All that a command line can name."""
    rows = {
        "bases": BASES,
        "plug-ins": PLUGINS,
        "threat models": THREATS,
        "attacks": [*ATTACKS, "worst(...)", "quantized(...)"],
        "models": [*MODELS, *(f"{name}(...)" for name in COMPOSED), "package.module:function"],
        "data": NAMES,
        "recipes": RECIPES,
        "dials": DIALS,
        "studies": [*STUDIES, "FILE.yaml"],
    }
    return _table(("kind", "names"), [(kind, ", ".join(f"`{name}`" for name in names)) for kind, names in rows.items()])


def methods() -> str:
    """Bases and plug-ins with their loss, each linked to its page."""
    parts = [*BASES.items(), *((f"+{name}", part) for name, part in PLUGINS.items())]
    return _table(
        ("method", "loss, and source"), [(f"[{name}]({_page_of(name)})", _first_line(part)) for name, part in parts]
    )


def attacks() -> str:
    """Attacks with what their classes say of themselves."""
    columns = ("attack", "does", "arguments", "inside the threat model", "transfers", "needs")
    return _table(columns, [
        (f"`{name}`", _first_line(attack), _arguments(attack), _yes(attack.bounded), _yes(attack.transfers),
         "gradients" if attack.uses_gradients else "queries")
        for name, attack in ATTACKS.items()
    ])  # fmt: skip


def recipes() -> str:
    """Presets with what they set."""
    return _table(("preset", "is", "epochs", "learning rate", "sets"), [
        (f"`{name}`", _first_line(preset), str(preset().epochs), _learning_rate(preset()), _flags_set(preset()))
        for name, preset in RECIPES.items()
    ])  # fmt: skip


def commands() -> str:
    """Each command with its arguments and flags."""
    sections = []
    for command, (options, _) in COMMANDS.items():
        sections += [f"## {command}", inspect.cleandoc(options.__doc__ or ""), _table(*_options(options))]
        if any(field.name == "settings" for field in fields(options)):
            sections += ["Settings, whose defaults are those of `--recipe`; here those of `common`:"]
            sections += [_table(*_options(Recipe))]
    return "\n\n".join(sections)


def api_of_methods() -> str:
    """Directives that describe every base and plug-in."""
    return _directives([*BASES.values(), *PLUGINS.values()])


def api_of_attacks() -> str:
    """Directives that describe every attack."""
    return _directives([*ATTACKS.values(), Worst, Quantized])


GENERATED: dict[str, Callable[[], str]] = {
    "choices": choices,
    "methods": methods,
    "attacks": attacks,
    "recipes": recipes,
    "commands": commands,
    "api-of-methods": api_of_methods,
    "api-of-attacks": api_of_attacks,
}


def generated(page: str) -> str:
    """Return the page with each marked block made anew."""
    return _BLOCK.sub(lambda block: f"{block[1]}{GENERATED[block[2]]()}\n{block[3]}", page)


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = tuple(columns)
    lines = [columns, ("---",) * len(columns), *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", r"\|")


def _directives(classes: Iterable[type]) -> str:
    return "\n\n".join(f"::: {each.__module__}.{each.__qualname__}" for each in classes)


def _first_line(thing: object) -> str:
    return inspect.cleandoc(thing.__doc__ or "").splitlines()[0]


def _page_of(method: str) -> str:
    name = method.removeprefix("+")
    return f"methods/{_PAGE_OF.get(name, name)}.md"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _spelled(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_spelled, value))
    return spell_number(value) if isinstance(value, float) else str(value)


def _arguments(attack: type[Attack]) -> str:
    arguments = [field for field in fields(attack) if field.name != "threat"]
    return ", ".join(
        f"`{each.name}`" if each.default is None
        else f'`{each.name}="{each.default}"`' if isinstance(each.default, str)
        else f"`{each.name}={_spelled(each.default)}`"
        for each in arguments
    )  # fmt: skip


def _learning_rate(recipe: Recipe) -> str:
    drops = [str(round(share * recipe.epochs)) for share in recipe.milestones]
    left = "a tenth" if recipe.lr_factor == Recipe().lr_factor else "less"
    return {
        "piecewise": f"{recipe.lr:g}, {left} after epoch{'s' * (len(drops) > 1)} {', '.join(drops)}",
        "linear": f"{recipe.lr:g}, linear from epoch {drops[0]} to {left} at each of {', '.join(drops[1:])}",
        "cosine": f"{recipe.lr:g}, cosine to 0",
        "onecycle": f"one cycle to {recipe.lr:g}",
        "constant": f"{recipe.lr:g}",
    }[recipe.schedule]


def _flags_set(recipe: Recipe) -> str:
    in_own_column = ("epochs", "lr", "schedule", "milestones")
    common = Recipe()
    changed = {
        field.name: getattr(recipe, field.name)
        for field in fields(Recipe)
        if field.name not in in_own_column and getattr(recipe, field.name) != getattr(common, field.name)
    }
    return " ".join(
        f"`{_flag(name)}`" if value is True else f"`{_flag(name)} {_spelled(value)}`" for name, value in changed.items()
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _options(options: type) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    hints = get_type_hints(options, include_extras=True)
    help_texts = _attribute_docstrings(options) | _annotated_help(hints)
    rows = [
        (_name_shown(field.name, hints[field.name]), _default(field), help_texts[field.name])
        for field in fields(options)
        if field.name != "settings"
    ]
    return ("option", "default", "is"), sorted(rows, key=lambda row: row[0].startswith("`-"))  # flags last


def _name_shown(name: str, hint: Any) -> str:
    metadata = getattr(hint, "__metadata__", ())
    if get_args(Positional[str])[1] in metadata:
        return next(f"`{each.metavar}`" for each in metadata if getattr(each, "metavar", None))
    aliases = [alias for each in metadata for alias in getattr(each, "aliases", None) or ()]
    return ", ".join(f"`{each}`" for each in (_flag(name), *aliases))


def _default(field: Field[Any]) -> str:
    if field.default is MISSING:
        return "required"
    without = field.default is None or field.default is False or field.default == ()
    return "" if without else f"`{_spelled(field.default)}`"


def _attribute_docstrings(options: type) -> dict[str, str]:
    """The string below each field, those of the bases too: what `--help` shows."""
    texts = {}
    for each in reversed(options.__mro__[:-1]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
                assert isinstance(text.value, ast.Constant)
                texts[field.target.id] = str(text.value.value)
    return texts


def _annotated_help(hints: dict[str, Any]) -> dict[str, str]:
    """The help of flags that several commands share, which stands in their type."""
    return {
        name: each.help
        for name, hint in hints.items()
        for each in getattr(hint, "__metadata__", ())
        if getattr(each, "help", None)
    }


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(generated(page.read_text()))
