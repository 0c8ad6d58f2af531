"""Recipes: the papers' settings, and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from advalign.errors import UserError
from advalign.recipes import RECIPES, Recipe
from advalign.threats import threat

# As in the authors' code or, for `common`, in Pang et al. 2021; step sizes of None are a quarter of eps.
PAPERS: dict[str, dict[str, Any]] = {
    "common": {"epochs": 110, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "eps": 8 / 255},
    "trades": {"epochs": 76, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "eps": 0.031, "step_size": 0.007},
    "mart": {"epochs": 120, "batch_size": 128, "lr": 0.01, "weight_decay": 3.5e-3, "eps": 0.031, "step_size": 0.007},
    "hat": {"epochs": 50, "batch_size": 128, "lr": 0.21, "nesterov": True, "cycle_momentum": True, "eps": 8 / 255},
    "rice": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "eps": 8 / 255, "mode": "train"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_build_and_attack_inside_a_valid_threat_model(name: str):
    recipe = RECIPES[name]()
    assert threat(recipe.norm, recipe.eps).eps == recipe.eps
    assert RECIPES[name].__doc__


@pytest.mark.parametrize("name", PAPERS)
def test_presets_are_the_papers(name: str):
    recipe = RECIPES[name]()
    assert {key: getattr(recipe, key) for key in PAPERS[name]} == PAPERS[name]
    assert recipe.steps == 10
    assert recipe.norm == "linf"
    assert recipe.augment == "flip-crop"


def test_a_recipe_cannot_change_but_has_variants():
    recipe = RECIPES["common"]()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 3  # pyright: ignore[reportAttributeAccessIssue]
    assert dataclasses.replace(recipe, epochs=3) == Recipe(epochs=3)
    with pytest.raises(UserError, match="epochs=0"):
        dataclasses.replace(recipe, epochs=0)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"epochs": 0}, "epochs=0 must be at least 1"),
    ({"epochs": -1}, "epochs=-1"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"steps": 0}, "steps=0 must be at least 1"),
    ({"validation": 0}, "validation=0 must be at least 1"),
    ({"validate_every": 0}, "validate_every=0 must be at least 1"),
    ({"subset": 0}, "subset=0 must be at least 1"),
    ({"lr": 0.0}, "lr=0 must be above 0"),
    ({"lr": -0.1}, "lr=-0.1"),
    ({"lr": math.nan}, "lr=nan"),
    ({"momentum": 1.0}, "momentum=1 must be in [0, 1)"),
    ({"momentum": -0.1}, "momentum=-0.1"),
    ({"momentum": 0.0, "nesterov": True}, "nesterov needs momentum"),
    ({"weight_decay": -1e-4}, "weight_decay=-0.0001 must be at least 0"),
    ({"clip_norm": 0.0}, "clip_norm=0.0 must be above 0"),
    ({"warmup": 5, "epochs": 5}, "warmup=5 must be at least 0 and below epochs=5"),
    ({"warmup": -1}, "warmup=-1"),
    ({"peak": 0.0}, "peak=0 must be between 0 and 1"),
    ({"peak": 1.0}, "peak=1 must be between 0 and 1"),
    ({"milestones": (1.5,)}, "milestones=(1.5,) must be shares in (0, 1]"),
    ({"milestones": (0.5, 0.0)}, "milestones=(0.5, 0.0)"),
    ({"milestones": (75,)}, "milestones=(75,)"),
    ({"step_size": 0.0}, "step_size=0.0 must be above 0"),
    ({"seed": -1}, "seed=-1 must be at least 0"),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_refusals_name_the_value_and_what_is_allowed(fields: dict[str, Any], words: str):
    with pytest.raises(UserError) as caught:
        Recipe(**fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_edges_are_allowed():
    Recipe(
        epochs=1, batch_size=1, steps=1, validation=1, validate_every=1, subset=1, seed=0, warmup=0, momentum=0.0,
        weight_decay=0.0, milestones=(1.0,),
    )  # fmt: skip
    Recipe(milestones=())
    Recipe(epochs=5, warmup=4)


def test_every_field_tells_what_it_is():
    """The docstrings under the fields are the help of `advalign train`."""
    import ast
    import inspect

    (body,) = ast.parse(inspect.getsource(Recipe)).body
    assert isinstance(body, ast.ClassDef)
    fields = [i for i, node in enumerate(body.body) if isinstance(node, ast.AnnAssign)]
    assert len(fields) == len(dataclasses.fields(Recipe))
    for i in fields:
        following = body.body[i + 1]
        assert isinstance(following, ast.Expr)
        assert isinstance(following.value, ast.Constant)
