"""Recipes: the papers' settings, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from advalign.errors import UserError
from advalign.training.recipes import RECIPES, Recipe

# As in the authors' code or, for `common`, in Pang et al. 2021; step sizes of None are a quarter of eps.
PAPERS: dict[str, dict[str, Any]] = {
    "common": {"epochs": 110, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "eps": 8 / 255},
    "trades": {"epochs": 76, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "eps": 0.031, "step_size": 0.007},
    "mart": {"epochs": 120, "batch_size": 128, "lr": 0.01, "weight_decay": 3.5e-3, "eps": 0.031, "step_size": 0.007},
    "hat": {"epochs": 50, "batch_size": 128, "lr": 0.21, "nesterov": True, "cycle_momentum": True, "eps": 8 / 255},
    "rice": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "eps": 8 / 255, "mode": "train"},
    "awp": {"epochs": 200, "lr": 0.1, "awp": 0.01, "awp_start": 0, "mode": "train", "start": "uniform"},
    "kd": {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "average": "swa", "average_start": 0.275, "mode": "train"},
    "lbgat": {"epochs": 100, "lr": 0.1, "warmup": 1, "weight_decay": 2e-4, "eps": 0.031, "step_size": 0.007},
    "ar-at": {"epochs": 100, "lr": 0.1, "warmup": 1, "weight_decay": 5e-4, "mode": "train", "start": "uniform"},
    "part": {"epochs": 80, "lr": 0.01, "weight_decay": 2e-4, "eps": 8 / 255},
    "ard": {"epochs": 200, "lr": 0.1, "weight_decay": 2e-4, "mode": "train"},
    "rslad": {"epochs": 300, "lr": 0.1, "weight_decay": 2e-4},
    "dm": {"epochs": 400, "batch_size": 512, "lr": 0.2, "average": "ema", "ema_decay": 0.995, "extra_share": 0.7},
}


@pytest.mark.parametrize("name", RECIPES)
def test_presets_build_and_attack_inside_a_valid_threat_model(name: str):
    recipe = RECIPES[name]()
    assert recipe.threat.eps == recipe.eps
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
    ({"average_start": 0.9}, "['average_start'] is given, but average=none"),
    ({"swa_every": 5}, "['swa_every'] is given, but average=none"),
    ({"awp": 2.0}, "awp=2 must be at least 0 and below 1"),
    ({"label_smoothing": 1.0}, "label_smoothing=1 must be at least 0 and below 1"),
    ({"extra_share": 1.0}, "extra_share=1 must be above 0 and below 1"),
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
    ({"milestones": (75,)}, "milestones=(75.0,)"),
    ({"step_size": 0.0}, "step_size=0.0 must be above 0"),
    ({"seed": -1}, "seed=-1 must be at least 0"),
    ({"seed": 2**63}, "seed=9223372036854775808 must be at least 0 and below 2**63"),
    ({"schedule": "linear"}, "unknown schedule of recipe 'linear'"),
    ({"schedule": "linear"}, "choose from constant, cosine, onecycle, piecewise"),
    ({"start": "gausian"}, "'gausian': did you mean 'gaussian'? choose from clean, gaussian, uniform"),
    ({"precision": "fp16"}, "'fp16': did you mean 'bf16'? choose from bf16, fp32"),
    ({"mode": "Train"}, "'Train': did you mean 'train'? choose from eval, train"),
    ({"augment": "flips"}, "'flips': did you mean 'flip'? choose from flip, flip-crop, none"),
    ({"norm": "l3"}, "unknown norm of recipe 'l3': did you mean 'l2'? choose from l2, linf"),
    ({"start": 3}, "start=3 must be one of uniform, gaussian, clean"),
    ({"epochs": 1.5}, "epochs=1.5 must be a whole number"),
    ({"lr": "fast"}, "lr='fast' must be a number"),
    ({"nesterov": "yes"}, "nesterov='yes' must be true or false"),
    ({"milestones": [0.5]}, "milestones=[0.5] must be tuple"),
    ({"milestones": (*[0.5] * 50, "half")}, "'half') must be tuple"),
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
    Recipe(seed=2**63 - 1)


def test_whole_numbers_become_floats_so_that_one_setting_has_one_digest():
    recipe = Recipe(lr=1, milestones=(1,), step_size=1)  # a type checker allows an int for a float
    assert repr((recipe.lr, recipe.milestones, recipe.step_size)) == "(1.0, (1.0,), 1.0)"


def test_importing_recipes_is_quick():
    code = "import sys; from advalign.training.recipes import Recipe; Recipe(); "
    code += "print(*{'torch', 'numpy', 'jaxtyping'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_the_documented_table_is_the_code():
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    presets = {row[0].split("`")[1]: row[1:] for row in rows if len(row) == 6}
    assert presets.keys() == RECIPES.keys()
    for name, (epochs, rate, decay, other, _) in presets.items():
        recipe = RECIPES[name]()
        assert int(epochs) == recipe.epochs
        cycle = re.fullmatch(r"one cycle to (\S+)", rate)
        highest = cycle[1] if cycle else rate.split(",")[0]
        assert float(highest) == recipe.lr
        assert recipe.schedule == ("onecycle" if cycle else "cosine" if "cosine" in rate else "piecewise")
        if recipe.schedule == "piecewise":  # "after epoch 100" is "from epoch 101 on"; epochs count from 1
            shift = 0 if "after" in rate else -1
            drops = [int(number) + shift for number in re.findall(r"\b\d+\b", rate.split(",", 1)[1])]
            assert drops == [round(share * recipe.epochs) for share in recipe.milestones]
        assert float(decay) == recipe.weight_decay
        assert ("Nesterov" in other) == recipe.nesterov
        assert ("momentum cycled" in other) == recipe.cycle_momentum
        assert ("train mode" in other) == (recipe.mode == "train")
        assert ("uniform start" in other) == (recipe.start == "uniform")
        assert ("no augmentation" in other) == (recipe.augment == "none")
        stated = {
            "eps": (r"eps (\.\d+)", 8 / 255),
            "step_size": (r"steps of (\.\d+)", None),
            "steps": (r"(\d+) (?:attack )?steps", 10),
            "batch_size": (r"batch (\d+)", 128),
            "validation": (r"(\d+) validation images", None),
            "subset": (r"([\d,]+) images,", None),
        }
        for field, (pattern, default) in stated.items():
            found = re.search(pattern, other)
            assert (float(found[1].replace(",", "")) if found else default) == getattr(recipe, field), (name, field)


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
