"""What `advalign list` shows: every registry as rows of name and description."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from advalign.attacks import Attack

Listing = list[tuple[str, str]]


def methods() -> Listing:
    """List bases and plug-ins with their loss."""
    from advalign.objectives import BASES, PLUGINS

    bases = [(name, _first_line(part)) for name, part in BASES.items()]
    return bases + [(f"+{name}", _first_line(part)) for name, part in PLUGINS.items()]


def attacks() -> Listing:
    """List attacks with what they use, whether they transfer, and whether they may leave the threat model."""
    from advalign.attacks import ATTACKS
    from advalign.attacks.spelled import WORDS

    rows = [(name, f"{_first_line(attack)} [{', '.join(_properties(attack))}]") for name, attack in ATTACKS.items()]
    return [*rows, *WORDS.items()]


def _properties(attack: type[Attack]) -> list[str]:
    """Return what an attack says of itself, in words."""
    uses = "gradients" if attack.uses_gradients else "queries"
    return [uses, *(["transfers"] if attack.transfers else []), *([] if attack.bounded else ["not bounded"])]


def models() -> Listing:
    """List built-in networks."""
    from advalign.models import MODELS

    own = ("package.module:function", "your own; called with classes= and channels= where it takes them")
    return [(name, _first_line(model)) for name, model in MODELS.items()] + [own]


def data() -> Listing:
    """List data sets."""
    from advalign.data import NAMES

    return list(NAMES.items())


def recipes() -> Listing:
    """List presets."""
    from advalign.training.recipes import RECIPES

    return [(name, _first_line(recipe)) for name, recipe in RECIPES.items()]


def studies() -> Listing:
    """List the studies: tables and figures of papers."""
    from advalign.studies import STUDIES

    own = ("FILE.yaml, FILE.py", "your own; or package.module:function")
    return [(name, _first_line(study)) for name, study in STUDIES.items()] + [own]


def layers_of(model: str) -> Listing:
    """List the layers of a model that a method may align to."""
    from advalign.models import build, layers

    return [(name, "") for name in layers(build(model, classes=10))]


LISTS: dict[str, Callable[[], Listing]] = {
    "methods": methods,
    "attacks": attacks,
    "models": models,
    "data": data,
    "recipes": recipes,
    "studies": studies,
}


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
