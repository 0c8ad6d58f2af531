"""A user's own attack in one file: the page's commands, its place in records and file names, and what is refused."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advalign.attacks import ATTACKS, FGSM, Worst, parse
from advalign.cli import commands as cli
from advalign.errors import UserError
from advalign.registration import register, register_attacks, source_digests
from advalign.threats import L2, Linf

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_attack.py"
PAGE = (ROOT / "docs" / "own-attack.md").read_text()
RULES = "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom advalign.attacks import Attack\n\n\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the example; what is registered or imported in the test is forgotten afterwards."""
    known, modules, path = dict(ATTACKS), set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    sys.path.insert(0, str(tmp_path))
    (tmp_path / "my_attack.py").write_text(EXAMPLE.read_text())
    yield tmp_path
    ATTACKS.clear()
    ATTACKS.update(known)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
    sys.path[:] = path


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def results(folder: Path) -> dict[str, dict]:
    files = (folder / "runs" / "mine" / "evaluations").glob("*.json")
    return {file.name: json.loads(file.read_text()) for file in files}


def test_the_page_shows_the_example_and_it_is_short():
    code = EXAMPLE.read_text()
    body = code[code.index("from dataclasses") :]
    assert len([line for line in body.splitlines() if line]) <= 22
    assert any(body.strip() == block.strip() for block in blocks("python"))


@pytest.mark.slow
def test_the_commands_of_the_page_and_its_python(folder: Path, capsys: pytest.CaptureFixture[str]):
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    train, evaluate, plugin = (shlex.split(line)[1:] for line in lines)
    cli.main([*train, "--device", "cpu"])
    cli.main([*evaluate, "-n", "60", "--device", "cpu"])
    assert "shrinking(steps=20)" in capsys.readouterr().out
    ((name, content),) = results(folder).items()
    assert [*content["outcomes"]] == ["clean", "fgsm", "shrinking(steps=20)"]
    assert content["records"][-1]["attack"] == "worst(fgsm, shrinking(steps=20))"
    assert len(content["own"]["shrinking"]) == 10
    cli.main([*plugin, "-n", "60", "--device", "cpu"])
    (other,) = (each for file, each in results(folder).items() if file != name)
    assert [*other["outcomes"]] == ["clean", "worst(fgsm, shrinking(steps=10))"]
    assert other["own"] == content["own"]
    (python,) = (block for block in blocks("python") if "aa.load" in block)
    scope: dict = {}
    capsys.readouterr()
    exec(python, scope)
    assert float((scope["x_adv"] - scope["images"].floats()).abs().max()) <= 0.1 + 1e-6
    assert re.fullmatch(r"Evaluation\(clean=.*, fgsm=.*, shrinking\(steps=20\)=.*\)\n", capsys.readouterr().out)


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.3)])
def test_on_a_linear_model_it_reaches_the_closed_form(folder: Path, threat: Linf | L2):
    """Two classes: the loss grows along one direction everywhere, so the optimum is the radius along it."""
    from my_attack import Shrinking  # pyright: ignore[reportMissingImports]

    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(12, 2)
    net = nn.Sequential(nn.Flatten(), linear)
    x, y = 0.4 + 0.2 * torch.rand(5, 3, 2, 2, generator=generator), torch.tensor([0, 1, 1, 0, 1])
    weight = linear.weight.detach()
    toward = torch.where(y[:, None] == 0, weight[1] - weight[0], weight[0] - weight[1]).view_as(x)
    length = toward.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    unit: Tensor = toward.sign() if isinstance(threat, Linf) else toward / length
    x_adv = Shrinking(threat, steps=4)(net, x, y)
    torch.testing.assert_close(x_adv, x + threat.eps * unit, atol=1e-5, rtol=0)


def test_the_source_enters_the_names_of_results_and_only_that_of_users_attacks(folder: Path):
    spelling = register_attacks("my_attack:Shrinking(steps=2)")
    assert spelling == "shrinking(steps=2)"
    mine = parse(spelling, threat=Linf(0.1))
    first = source_digests([mine])
    assert [*first] == ["shrinking"]
    assert source_digests([FGSM(Linf(0.1)), parse("autoattack", threat=Linf(0.1))]) == {}
    assert source_digests([Worst(Linf(0.1), (FGSM(Linf(0.1)), mine))]) == first
    (folder / "my_attack.py").write_text(EXAMPLE.read_text().replace("self.steps)", "self.steps) ** 2", 1))
    assert source_digests([mine]) != first


@pytest.mark.slow
def test_another_source_is_another_result(folder: Path, monkeypatch: pytest.MonkeyPatch):
    train = ["train", "natural", "--data", "digits", "--model", "small-cnn(width=4)", "--recipe", "digits"]
    cli.main([*train, "--epochs", "1", "--subset", "256", "--name", "mine", "--device", "cpu"])
    evaluate = ["evaluate", "runs/mine", "--attacks", "my_attack:Shrinking(steps=2)", "-n", "30", "--device", "cpu"]
    cli.main(evaluate)
    cli.main(evaluate)
    assert len(results(folder)) == 1
    (folder / "my_attack.py").write_text("# changed\n" + EXAMPLE.read_text())
    cli.main(evaluate)
    assert len(results(folder)) == 2
    library = ["evaluate", "runs/mine", "--attacks", "fgsm", "-n", "30", "--device", "cpu"]
    cli.main(library)
    cli.main([*library, "--plugin", "my_attack:Shrinking"])  # which none of the attacks is
    assert len(results(folder)) == 3


@pytest.mark.slow
def test_it_transfers_and_examples_are_kept_by_source(folder: Path, capsys: pytest.CaptureFixture[str]):
    for seed in "01":
        train = ["train", "natural", "--data", "digits", "--model", "small-cnn(width=4)", "--recipe", "digits"]
        cli.main([*train, "--epochs", "1", "--subset", "256", "--seed", seed, "--name", seed, "--device", "cpu"])
    transfer = ["transfer", "runs/0", "runs/1", "--eps", "0.1", "-n", "20", "--device", "cpu", "--attack"]
    cli.main([*transfer, "shrinking(steps=2)", "--plugin", "my_attack:Shrinking"])
    cli.main([*transfer, "my_attack:Shrinking(steps=2)"])
    (matrix,) = (folder / "transfer").glob("*.json")
    assert [*json.loads(matrix.read_text())["own"]] == ["shrinking"]
    kept = folder / "runs" / "0" / "transfer"
    assert len(list(kept.iterdir())) == 1
    (folder / "my_attack.py").write_text("# changed\n" + EXAMPLE.read_text())
    cli.main([*transfer, "my_attack:Shrinking(steps=2)"])
    assert len(list(kept.iterdir())) == 2
    capsys.readouterr()
    cli.main(["list", "attacks"])
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("shrinking"))
    assert row.endswith("shrink from the radius to nothing. [gradients, transfers]")


@pytest.mark.parametrize(
    ("spelling", "source", "words"),
    [
        ("own_a:Thing", "class Thing: pass", "must be a class derived from advalign"),
        (
            "own_b:Own",
            "@dataclass(frozen=True)\nclass Own(Attack):\n    name: ClassVar[str] = 'pgd'\n"
            "    def run(self, model, x, y): return x",
            "is called 'pgd', as advalign.attacks.gradient:PGD is: rename it",
        ),
        (
            "own_c:Own",
            "@dataclass(frozen=True)\nclass Own(Attack):\n    name: ClassVar[str] = 'worst'\n"
            "    def run(self, model, x, y): return x",
            "the word 'worst' of evaluations",
        ),
        (
            "own_d:Own",
            "@dataclass(frozen=True)\nclass Own(Attack):\n    name: ClassVar[str] = 'own'\n",
            "cannot be made without arguments",
        ),
    ],
)
def test_what_is_no_attack_is_refused(folder: Path, spelling: str, source: str, words: str):
    module = spelling.partition(":")[0]
    (folder / f"{module}.py").write_text(RULES + source)
    before = dict(ATTACKS)
    with pytest.raises(UserError, match=re.escape(words)):
        register(spelling)
    assert before == ATTACKS


def test_an_attack_that_leaves_its_threat_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]):
    source = EXAMPLE.read_text().replace("return x_adv", "return 1 - x").replace('"shrinking"', '"far"')
    (folder / "my_far_attack.py").write_text(source)
    train = ["train", "natural", "--data", "digits", "--model", "small-cnn(width=4)", "--recipe", "digits"]
    cli.main([*train, "--epochs", "1", "--subset", "256", "--name", "mine", "--device", "cpu"])
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "runs/mine", "--attacks", "my_far_attack:Shrinking", "--device", "cpu", "-n", "30"])
    assert "outside" in capsys.readouterr().err
