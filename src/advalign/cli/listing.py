"""What `advalign list` shows: every registry as rows of name and description."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import TYPE_CHECKING

from advalign.errors import UserError

if TYPE_CHECKING:
    from advalign.attacks import Attack
    from advalign.objectives import Method

Listing = list[tuple[str, str]]


def methods() -> Listing:
    """List bases and plug-ins with their loss, what they need, and what a step costs in passes through the student."""
    from advalign.objectives import BASES, PLUGINS, parse
    from advalign.objectives.passes import count_passes

    bases = {name: parse(name) for name in BASES}
    costs = {name: count_passes(method) for name, method in bases.items()}
    rows = []
    for name, part in BASES.items():
        forward, backward = costs[name]
        rows.append((name, _described(part, [*_needs(bases[name]), f"{forward} forward, {backward} backward passes"])))
    for name, part in PLUGINS.items():
        base, method = next(pair for base in ("trades", "at", "ard") for pair in _joined(base, name))
        forward, backward = (a - b for a, b in zip(count_passes(method), costs[base], strict=True))
        needs = [each for each in _needs(method) if each not in _needs(bases[base])]
        rows.append((f"+{name}", _described(part, [*needs, f"on {base} {forward:+} forward, {backward:+} backward"])))
    return rows


def _joined(base: str, plugin: str) -> list[tuple[str, Method]]:
    """Return a base with its method with the plug-in; nothing if they make no sense together."""
    from advalign.objectives import parse

    try:
        return [(base, parse(f"{base}+{plugin}"))]
    except UserError:
        return []


def _needs(method: Method) -> list[str]:
    """Return what a method needs beside the student and a batch, in words."""
    guests = [f"{name} model" for name in method.guests]
    further = {0: [], 1: ["second view"]}.get(method.further, [f"{method.further} further views"])
    return [*guests, *further, *(["no extra data"] if method.reads_rows else [])]


def attacks() -> Listing:
    """List attacks with what they use, whether they transfer, and whether they may leave the threat model."""
    from advalign.attacks import ATTACKS
    from advalign.attacks.spelled import WORDS

    rows = [(name, _described(attack, _properties(attack))) for name, attack in ATTACKS.items()]
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


def training_attacks() -> Listing:
    """List the ways in which `advalign train --attack` makes its adversarial images, with their passes in a step."""
    from advalign.training.attacks import CHEAP, PGD

    rows: Listing = [(PGD.name, _described(PGD, ["--steps forward and backward passes"]))]
    for name, make in CHEAP.items():
        attack = make()
        arguments = ", ".join(
            f"{key}={value:g}" for key, value in vars(attack).items() if key in signature(make).parameters
        )
        passes = f"{attack.passes} forward, {attack.passes} backward passes"
        rows.append((f"{name}({arguments})", _described(make, [passes])))
    return rows


def frontiers() -> Listing:
    """List the ways in which `advalign frontier` makes one network of several."""
    from advalign.frontier.frontier import DIALS

    return [(name, _first_line(make)) for name, make in DIALS.items()]


def studies() -> Listing:
    """List the studies: tables and figures of papers."""
    from advalign.studies import STUDIES

    own = ("FILE.yaml, FILE.py", "your own; or package.module:function")
    return [(name, _first_line(study)) for name, study in STUDIES.items()] + [own]


def layers_of(model: str) -> Listing:
    """List the layers of a model that a method may align to."""
    from advalign.models import build, layers

    return [(name, "") for name in layers(build(model, classes=10))]


def zoo_models() -> Listing:
    """List the published models that `zoo:NAME@FILE` names, with their data, threat model and numbers."""
    from advalign.runs.zoo import zoo
    from advalign.threats import make_threat

    return [
        (
            key,
            f"{each.architecture}, {each.data}, {make_threat(each.norm, each.eps)}: clean {each.clean:.2f} %, "
            f"AutoAttack {each.autoattack:.2f} %",
        )
        for key, each in zoo().items()
    ]


LISTS: dict[str, Callable[[], Listing]] = {
    "methods": methods,
    "attacks": attacks,
    "models": models,
    "data": data,
    "recipes": recipes,
    "training-attacks": training_attacks,
    "frontiers": frontiers,
    "studies": studies,
    "zoo": zoo_models,
}


def _described(thing: object, properties: list[str]) -> str:
    return f"{_first_line(thing)} [{', '.join(properties)}]"


def _first_line(thing: object) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]
