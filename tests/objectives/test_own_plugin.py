"""A method of one's own in one file: from the command line, in the documentation, and what is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from advalign.errors import UserError
from advalign.objectives import BASES, PLUGINS, parse
from advalign.objectives.bases.trades import TRADES
from advalign.objectives.contract import Outputs, Terms
from advalign.objectives.method import PlugIn
from advalign.registration import register
from advalign.runs import Run

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_plugin.py"


def advalign(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "advalign", *arguments],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def train(folder: Path) -> Run:
    """Train with the plug-in that lies in the folder; return its run."""
    done = advalign(
        folder, "train", "trades+guided(weight=0.5)", "--plugin", "my_plugin:Guided", "--data", "digits", "--model",
        "small-cnn(width=4)", "--recipe", "digits", "--epochs", "1", "--steps", "1", "--subset", "256",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return max((Run.read(path) for path in (folder / "runs").glob("trades*")), key=lambda run: run.path.stat().st_mtime)


@pytest.mark.slow
def test_the_example_trains_from_the_command_line(tmp_path: Path):
    (tmp_path / "my_plugin.py").write_text(EXAMPLE.read_text())
    run = train(tmp_path)
    assert run.finished
    assert run.setting["method"] == "trades+guided(weight=0.5)"
    assert set(run.log[0]["terms"]) == {"clean", "kl", "guided"}


@pytest.mark.slow
def test_the_source_of_a_plug_in_is_part_of_the_run(tmp_path: Path):
    (tmp_path / "my_plugin.py").write_text(EXAMPLE.read_text())
    run, again = train(tmp_path), train(tmp_path)
    assert again.id == run.id
    (tmp_path / "my_plugin.py").write_text(EXAMPLE.read_text().replace("F.mse_loss", "F.l1_loss"))
    changed = train(tmp_path)
    assert changed.id != run.id
    assert changed.setting["guests"] == run.setting["guests"]
    evaluated = advalign(tmp_path, "evaluate", str(run.path), "--attacks", "fgsm", "-n", "50")  # needs no plug-in
    assert evaluated.returncode == 0, evaluated.stderr


def test_the_documentation_shows_the_example_and_it_is_short():
    code = EXAMPLE.read_text()
    body = code[code.index("import torch") :]
    assert len([line for line in body.splitlines() if line]) <= 20
    shown = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own-method.md").read_text(), re.DOTALL)
    assert any(body.strip() == block.strip() for block in shown)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Registries that forget what a test registers, and a folder on the path."""
    monkeypatch.syspath_prepend(tmp_path)
    with patch.dict(BASES), patch.dict(PLUGINS):
        yield tmp_path


HEAD = "from advalign.objectives.contract import ADV, Term\nfrom advalign.objectives.method import Base, PlugIn\n\n"


@pytest.mark.parametrize(
    ("spelling", "source", "message"),
    [
        ("wrong_a", "", "'wrong_a' must be package.module:Class"),
        ("wrong_b:Thing", None, "cannot import 'wrong_b'"),
        ("wrong_c:Thign", "class Thing: pass", "did you mean 'Thing'"),
        (
            "wrong_d:Thing",
            "class Thing: pass",
            "wrong_d:Thing must be a class derived from advalign.PlugIn, advalign.Base or advalign.Attack",
        ),
        ("wrong_e:make", "def make(): pass", "must be a class derived from"),
        (
            "wrong_f:Own",
            "class Own(PlugIn):\n    name = 'vfd'\n    def terms(self, outs, y): return {}",
            "is called 'vfd', as advalign.objectives.plugins.vfd:VFD is: rename it",
        ),
        (
            "wrong_g:Own",
            "class Own(PlugIn):\n    name = 'own'\n    def __init__(self, weight): super().__init__()\n"
            "    def terms(self, outs, y): return {}",
            "cannot be made without arguments",
        ),
        ("wrong_h:Own", "class Own(PlugIn):\n    name = 'own'", "cannot be made without arguments"),
        ("wrong_i:Own", "class Own(PlugIn):\n    def terms(self, outs, y): return {}", "name"),
        (
            "wrong_j:Own",
            "class Own(PlugIn):\n    name = 'own'\n    def __init__(self, weight=1.0):\n        super().__init__()\n"
            "        self.scale = weight\n    def terms(self, outs, y): return {}",
            "must keep its argument ['weight'] under that name",
        ),
        (
            "wrong_l:Own",
            "class Own(PlugIn):\n    name = 'own'\n    def __init__(self): pass\n"
            "    def terms(self, outs, y): return {}",
            "must call super().__init__() first",
        ),
        (
            "wrong_k:Own",
            "class Own(PlugIn):\n    name = 'my_own'\n    def terms(self, outs, y): return {}",
            "is called 'my_own': a name is letters and digits, joined by hyphens",
        ),
    ],
)
def test_what_is_no_plug_in_is_refused_in_one_line(registries: Path, spelling: str, source: str | None, message: str):
    if source is not None:
        (registries / f"{spelling.partition(':')[0]}.py").write_text(HEAD + source + "\n")
    with pytest.raises(UserError) as caught:
        register(spelling)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_base_of_ones_own_is_registered_too(registries: Path):
    (registries / "own_base.py").write_text(
        HEAD + "class Own(Base):\n    name = 'own'\n    supervises = ('adv',)\n"
        "    def terms(self, outs, y): return {'own': Term(1.0, outs[ADV].logits.mean(), supervises='adv')}\n"
    )
    register("own_base:Own")
    register("own_base:Own")  # twice is once
    assert str(parse("own+vfd")) == "own+vfd"


def test_an_argument_that_the_spelling_lacks_is_refused_from_python_too():
    """Two weights would have one spelling, and one run."""

    class Hides(PlugIn):
        name = "hides"

        def __init__(self, weight: float = 1.0) -> None:
            super().__init__()
            self.scale = weight

        def terms(self, outs: Outputs, y: Tensor) -> Terms:
            return {}

    with pytest.raises(UserError, match="must keep its argument"):
        str(TRADES() + Hides(2.0))


@pytest.mark.slow
def test_a_class_typed_into_a_shell_trains_too(tmp_path: Path):
    code = (
        "import advalign as aa\nfrom advalign.training.recipes import Recipe\n"
        "class Own(aa.PlugIn):\n    name = 'own'\n    def terms(self, outs, y): return {}\n"
        "recipe = Recipe(epochs=1, steps=1, subset=64, validation=32, batch_size=32)\n"
        "print(aa.train(aa.AT() + Own(), data='digits', model='small-cnn(width=2)', recipe=recipe).finished)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "True", done.stderr
