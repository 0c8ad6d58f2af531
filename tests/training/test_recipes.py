"""Recipes: the papers' settings, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro

from advalign.errors import UserError
from advalign.spelling import parse_number
from advalign.training.recipes import ADDED, RECIPES, Recipe
from advalign.training.schedule import learning_rate
from advalign.training.train import train

# As in the authors' code or, for `common`, in Pang et al. 2021; step sizes of None are a quarter of eps.
PAPERS: dict[str, dict[str, Any]] = {
    "common": {"epochs": 110, "batch_size": 128, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "eps": 8 / 255},
    "trades": {"epochs": 76, "batch_size": 128, "lr": 0.1, "weight_decay": 2e-4, "eps": 0.031, "step_size": 0.007},
    "mart": {"epochs": 120, "batch_size": 128, "lr": 0.01, "weight_decay": 3.5e-3, "eps": 0.031, "step_size": 0.007},
    "hat": {"epochs": 50, "batch_size": 128, "lr": 0.21, "nesterov": True, "cycle_momentum": True, "eps": 8 / 255},
    "rice": {"epochs": 200, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4, "eps": 8 / 255, "mode": "train"},
    "awp": {"epochs": 200, "lr": 0.1, "awp": 0.01, "awp_start": 0, "mode": "train", "start": "uniform"},
    "trades-awp": {"epochs": 200, "weight_decay": 5e-4, "awp": 0.005, "awp_start": 9, "start": "gaussian"},
    "kd": {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "average": "swa", "average_start": 0.275, "mode": "train"},
    "lbgat": {"epochs": 100, "lr": 0.1, "warmup": 1, "weight_decay": 2e-4, "eps": 0.031, "step_size": 0.007},
    "ar-at": {"epochs": 100, "lr": 0.1, "warmup": 1, "weight_decay": 5e-4, "mode": "train", "start": "uniform"},
    "part": {"epochs": 80, "lr": 0.01, "weight_decay": 2e-4, "eps": 8 / 255},
    "score": {"epochs": 110, "lr": 0.05, "weight_decay": 5e-4, "milestones": (100 / 110, 105 / 110)},
    "adaiad": {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "milestones": (0.5, 0.75), "mode": None},
    "rebat": {
        "epochs": 200,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "milestones": (0.5, 0.75),
        "lr_factor": 1.5,
        "mode": "train",
        "average": "method",
    },
    "generalist": {"epochs": 120, "lr": 0.01, "weight_decay": 3.5e-3, "eps": 0.031, "average": "method", "mode": None},
    "acat": {
        "epochs": 110,
        "lr": 0.2,
        "schedule": "cosine",
        "weight_decay": 5e-4,
        "steps": 2,
        "step_size": 8 / 255,
        "eps_ramp": True,
        "awp": 0.005,
        "awp_start": 9,
        "average": "ema",
        "ema_decay": 0.9996,
        "ema_constant": True,
    },
    "dajat": {
        "epochs": 200,
        "lr": 0.2,
        "schedule": "cosine",
        "weight_decay": 5e-4,
        "steps": 5,
        "step_size": 4 / 255,
        "eps_ramp": True,
        "awp": 0.005,
        "awp_start": 9,
        "average": "ema",
        "average_start": 0.75,
        "ema_decay": 0.9996,
        "ema_constant": True,
    },
    "rpat": {"epochs": 200, "lr": 0.1, "weight_decay": 5e-4, "milestones": (0.5, 0.75), "mode": None},
    "adr": {"epochs": 200, "lr": 0.1, "nesterov": True, "milestones": (0.5, 0.75), "mode": "train"},
    "ikl": {"epochs": 200, "lr": 0.2, "schedule": "cosine", "weight_decay": 5e-4, "awp": 0.005, "awp_start": 9},
    "ard": {"epochs": 200, "lr": 0.1 / 10, "weight_decay": 2e-4 * 10, "mode": "train", "batchnorm_passes": "clean"},
    "iad": {"epochs": 200, "lr": 0.1, "weight_decay": 2e-4, "mode": "train"},
    "rslad": {"epochs": 300, "lr": 0.1 / 10, "weight_decay": 2e-4 * 10},
    "adaad": {"epochs": 200, "lr": 0.1 / 10, "weight_decay": 5e-4 * 10},
    "dm": {
        "epochs": 400,
        "batch_size": 512,
        "lr": 0.2,
        "average": "ema",
        "ema_decay": 0.995,
        "extra_share": 0.7,
        "batchnorm_momentum": 0.01,
    },
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
    assert recipe.steps == PAPERS[name].get("steps", 10)
    assert recipe.norm == "linf"
    assert recipe.augment == "flip-crop"


def test_the_learning_rate_on_imagenet_is_that_of_the_authors_configuration():
    """Wong et al.'s configs_fast_4px_phase1 to 3: straight lines through these rates, from the first epoch's end on."""
    recipe = RECIPES["imagenet"]()
    ends = np.interp(range(1, 16), [1, 6, 12, 15], [0.4, 0.04, 0.004, 0.0004])
    assert [learning_rate(recipe, epoch, 1) for epoch in range(1, 15)] == pytest.approx(ends[1:])
    assert learning_rate(recipe, 0, 1) == pytest.approx(0.4 / 5)
    assert (recipe.weight_decay, recipe.eps, recipe.all_steps) == (1e-4, 4 / 255, (2,))


@pytest.mark.parametrize(
    ("name", "model"), [("imagenet", "tiny_vit"), ("imagenet", "tiny_convnext"), ("tiny-imagenet", "")]
)
def test_presets_for_larger_images_make_steps(name: str, model: str, tmp_path: Path):
    """On generated images, two epochs of the preset: the loss is finite, and the average is what is saved."""
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "mine.npz",
        x_train=draw.integers(0, 256, (24, 32, 32, 3), dtype=np.uint8), y_train=np.arange(24) % 3,
        x_test=draw.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8), y_test=np.arange(3),
    )  # fmt: skip
    recipe = dataclasses.replace(RECIPES[name](), epochs=2, batch_size=8, validation=4, validate_every=2)
    spelling = f"tests.networks:{model}" if model else "small-cnn(width=2)"
    run = train("at", data=f"npz:{tmp_path / 'mine.npz'}", model=spelling, recipe=recipe, runs=tmp_path)
    assert run.finished
    assert all(math.isfinite(row["loss"]) for row in run.log)


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
    ({"average_start": 0.5, "average": "method"}, "['average_start'] is given, but average=method"),
    ({"ema_epochs": True}, "ema_epochs is given, but average=none"),
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
    ({"schedule": "polynomial"}, "unknown schedule of recipe 'polynomial'"),
    ({"schedule": "polynomial"}, "choose from constant, cosine, linear, onecycle, piecewise"),
    ({"start": "gausian"}, "'gausian': did you mean 'gaussian'? choose from clean, gaussian, unclamped, uniform"),
    ({"precision": "f16"}, "'f16': did you mean 'fp16'? choose from bf16, fp16, fp32"),
    ({"mode": "Train"}, "'Train': did you mean 'train'? choose from eval, train"),
    (
        {"augment": "flips"},
        "'flips': did you mean 'flip'? choose from autoaugment, autoaugment-first, cropshift, flip, ",
    ),
    ({"norm": "l3"}, "unknown norm of recipe 'l3': did you mean 'l2'? choose from l1, l2, linf"),
    ({"start": 3}, "start=3 must be one of uniform, unclamped, gaussian, clean"),
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


def test_a_field_that_came_later_names_a_run_only_where_it_differs():
    assert not ADDED & Recipe(average="ema").setting.keys()
    assert Recipe(average="ema", ema_epochs=True).setting["ema_epochs"] is True
    assert {*Recipe().setting, *ADDED} == {field.name for field in dataclasses.fields(Recipe)}


def test_whole_numbers_become_floats_so_that_one_setting_has_one_digest():
    recipe = Recipe(lr=1, milestones=(1,), step_size=1)  # a type checker allows an int for a float
    assert repr((recipe.lr, recipe.milestones, recipe.step_size)) == "(1.0, (1.0,), 1.0)"


def test_importing_recipes_is_quick():
    code = "import sys; from advalign.training.recipes import Recipe; Recipe(); "
    code += "print(*{'torch', 'numpy', 'jaxtyping'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


def test_the_flags_that_the_documentation_shows_make_the_recipe():
    """Its table is generated; here its rows are read back by the parser of the command line."""
    page = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]
    presets = {row[0].strip("`"): row[2:] for row in rows if len(row) == 5}
    assert presets.keys() == RECIPES.keys()
    for name, (epochs, rate, flags) in presets.items():
        recipe = RECIPES[name]()
        cycle = re.fullmatch(r"one cycle to (\S+)", rate)
        schedule = "onecycle" if cycle else next((each for each in ("cosine", "linear") if each in rate), "piecewise")
        assert schedule == recipe.schedule
        if schedule in ("piecewise", "linear"):
            drops = [int(number) for number in re.findall(r"\b\d+\b", rate.split(",", 1)[1])]
            assert drops == [round(share * recipe.epochs) for share in recipe.milestones]
        shown = ["--epochs", epochs, "--lr", cycle[1] if cycle else rate.split(",")[0], "--schedule", schedule]
        words = shlex.split(flags.replace("`", ""))
        numbers = [str(parse_number(word)) if re.fullmatch(r"\d+/\d+", word) else word for word in words]
        read = tyro.cli(Recipe, args=[*shown, *numbers])
        assert dataclasses.replace(read, milestones=recipe.milestones) == recipe, name


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
