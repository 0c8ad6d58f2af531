"""A study of one's own: in YAML, in Python, and what is misspelled in it."""

from __future__ import annotations

import re
import shlex
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from tests.samples import STUDY_YAML

from advalign.cli import commands as cli
from advalign.errors import UserError
from advalign.studies import SCALES, STUDIES, Study, find_study, run_study
from advalign.studies.planning import plan_jobs
from advalign.training.recipes import common, digits

TINY = SCALES["tiny"]


def read(text: str, folder: Path) -> Study:
    (folder / "mine.yaml").write_text(text)
    return find_study(str(folder / "mine.yaml"), TINY)


@pytest.mark.parametrize("steps", ["2:5:10", '"2:5:10"'])
def test_steps_by_parts_are_no_number_in_base_60(steps: str, tmp_path: Path):
    text = f"data: digits\nmethods: [at]\nrecipe: {{steps: {steps}, attack: pgd}}\n"
    assert read(text, tmp_path).cells[0].recipe.all_steps == (2, 5, 10)
    with pytest.raises(UserError, match="eps='0:30'"):
        read("data: digits\nmethods: [at]\nrecipe: {eps: 0:30}\n", tmp_path)


def test_yaml(tmp_path: Path):
    study = read(STUDY_YAML, tmp_path)
    assert (study.name, study.title, study.seeds) == ("mine", "the weight, scale tiny", 2)
    assert [(cell.row, cell.method, cell.at) for cell in study.cells] == [
        ("natural", "natural", ""), ("trades", "trades", 0), ("a tenth", "trades+vfd(weight=0.1)", 0.1),
    ]  # fmt: skip
    first, _, third = (cell.recipe for cell in study.cells)
    assert (first.epochs, first.eps, first.milestones, first.lr) == (2, 8 / 255, (0.5, 0.9), digits().lr)
    assert (third.epochs, third.eps) == (3, 8 / 255)
    assert [(c.heading, c.attack, c.n, c.black_box) for c in study.columns] == [
        ("clean", "clean", None, False), ("PGD", "pgd(steps=2)", 100, False), ("far", "fgsm", None, True),
    ]  # fmt: skip
    assert study.surrogate is not None
    assert study.surrogate.model == "small-cnn(width=8)"
    assert len(study.figures) == 2


def test_what_yaml_leaves_out_is_the_scale_s(tmp_path: Path):
    study = read("data: cifar10\nmethods: [trades]", tmp_path)
    assert study.columns == TINY.columns()
    assert study.surrogate is not None
    assert (study.cells[0].recipe, study.cells[0].model, study.surrogate.model) == (TINY.recipe, TINY.model, TINY.large)
    assert read("data: cifar10\nmethods: [trades]\nrecipe: common", tmp_path).cells[0].recipe == common()


MISTAKES = {
    "key": ("methdos: [at]", "unknown key of a study 'methdos': did you mean 'methods'"),
    "no data": ("methods: [at]", "mine.yaml has no data"),
    "method": ("data: digits\nmethods: [tardes]", "unknown method 'tardes': did you mean 'trades'"),
    "key of a method": ("data: digits\nmethods: [{mehtod: at}]", "unknown key of methods 'mehtod'"),
    "no method": ("data: digits\nmethods: [{row: at}]", "has no method"),
    "model": ("data: digits\nmodel: small-cn\nmethods: [at]", "did you mean 'small-cnn'"),
    "preset": ("data: digits\nrecipe: digist\nmethods: [at]", "unknown recipe 'digist': did you mean 'digits'"),
    "field": ("data: digits\nrecipe: {epcohs: 3}\nmethods: [at]", "did you mean 'epochs'"),
    "field's value": ("data: digits\nrecipe: {epochs: many}\nmethods: [at]", "epochs='many' must be a whole number"),
    "attack": ("data: digits\nmethods: [at]\ncolumns: [pdg]", "unknown attack 'pdg': did you mean 'pgd'"),
    "key of a column": ("data: digits\nmethods: [at]\ncolumns: [{atack: fgsm}]", "did you mean 'attack'"),
    "column's value": ("data: digits\nmethods: [at]\ncolumns: [{attack: fgsm, n: few}]", "n='few' must be"),
    "no list": ("data: digits\nmethods: at", "methods: 'at' must be a list"),
    "no mapping": ("[at]", "a study: ['at'] must be a mapping"),
    "data's type": ("data: 3\nmethods: [at]\ncolumns: [clean]", "unknown data set '3'"),
    "title's type": ("data: [digits]\nmethods: [at]\ncolumns: [clean]", "data=['digits'] must be a word"),
    "seeds": ("data: digits\nmethods: [at]\nseeds: some", "seeds='some' must be a whole number"),
    "figure": ("data: digits\nmethods: [at]\ncolumns: [clean]\nfigure: weight", "a figure needs the columns"),
    "no YAML": ("data: [", "cannot read"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_get_one_line(name: str, tmp_path: Path):
    text, words = MISTAKES[name]
    with pytest.raises(UserError, match=re.escape(words)) as refused:
        plan_jobs(read(text, tmp_path), 1, runs=tmp_path, data_dir=None)
    assert "\n" not in str(refused.value)


PYTHON = """
from dataclasses import replace
from advalign.studies import Cell, Column, Scale, Study

def study(scale: Scale) -> Study:
    recipe = replace(scale.recipe, epochs=3)
    cells = [Cell(method=m, data="digits", model=scale.model, recipe=recipe) for m in ("natural", "at")]
    return Study(name="mine", title="Mine", cells=tuple(cells), columns=(Column(heading="clean"),))
"""


def test_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "my_own_study.py").write_text(PYTHON)
    monkeypatch.chdir(tmp_path)
    for spelling in ("my_own_study.py", "my_own_study:study"):
        study = find_study(spelling, TINY)
        assert (study.rows, study.cells[0].model) == (["natural", "at"], TINY.model)
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    with pytest.raises(UserError, match=r"cannot read broken\.py: ModuleNotFoundError"):
        find_study("broken.py", TINY)
    with pytest.raises(UserError, match=r"no such file: 'nowhere\.py'"):
        find_study("nowhere.py", TINY)


DOCS = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()


@pytest.mark.slow
def test_the_examples_of_the_documentation_run_as_shown(tmp_path: Path):
    (yaml,) = re.findall(r"```yaml\n(.*?)```", DOCS, re.DOTALL)
    (python,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    (tmp_path / "my_study.py").write_text(python)
    for study in (read(yaml, tmp_path), find_study(str(tmp_path / "my_study.py"), TINY)):
        results = run_study(study, seeds=1, runs=tmp_path / "runs", out=tmp_path / study.name, device="cpu")
        assert all(job.finished for job in results.jobs)
        assert (tmp_path / study.name / "report-files" / "along-weight.png").exists()


@pytest.mark.parametrize("line", re.findall(r"^(?:RAY_ADDRESS=\S+ )?advalign (study .+)$", DOCS, re.MULTILINE))
def test_the_commands_of_the_documentation_parse(line: str, monkeypatch: pytest.MonkeyPatch):
    reached = []
    monkeypatch.setitem(cli.COMMANDS, "study", (cli.COMMANDS["study"][0], reached.append))
    cli.main(shlex.split(line))
    assert len(reached) == 1


def test_the_documentation_counts_the_cells():
    rows = dict(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|.*\| (\d+) \|$", DOCS.partition("--scale`")[0], re.MULTILINE))
    counts = {name: int(count) for names, count in rows.items() for name in re.findall(r"\w+", names)}
    assert counts == {name: len(study(SCALES["paper"]).cells) for name, study in STUDIES.items()}


REFUSED_YAML = {
    "figure": ("figure: tradeoff", "unknown figure 'tradeoff': did you mean 'trade-off'"),
    "figure as a list": ("figure: [a]", r"unknown figure \"\['a'\]\""),
    "seed": ("recipe: {seed: 5}", "the seeds are the study's"),
    "preset as a list": ("recipe: {preset: [digits]}", r"unknown recipe \"\['digits'\]\""),
}


@pytest.mark.parametrize("name", REFUSED_YAML)
def test_more_that_is_refused(name: str, tmp_path: Path):
    line, words = REFUSED_YAML[name]
    with pytest.raises(UserError, match=words):
        read(f"data: digits\nmethods: [trades]\ncolumns: [clean, {{heading: PGD, attack: pgd}}]\n{line}\n", tmp_path)


def test_a_number_in_a_form_that_yaml_takes_for_a_word(tmp_path: Path):
    study = read("data: digits\nmethods: [trades]\nrecipe: {lr: 1e-3}\ncolumns: [clean]", tmp_path)
    assert study.cells[0].recipe.lr == 1e-3


FAILING = {
    "raises": ("def study(scale):\n    raise ValueError('no')", r"study\(scale\) raised ValueError: no"),
    "takes nothing": ("def study():\n    pass", r"study\(scale\) raised TypeError"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_function_that_fails_is_one_line(name: str, tmp_path: Path):
    text, words = FAILING[name]
    (tmp_path / "mine.py").write_text(text)
    with pytest.raises(UserError, match=words):
        find_study(str(tmp_path / "mine.py"), TINY)


def test_a_file_may_define_dataclasses(tmp_path: Path):
    (tmp_path / "with_classes.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "from advalign.studies.paper import figure4a\n"
        "@dataclass\nclass Pair:\n    a: int\n\ndef study(scale):\n    return figure4a(scale)\n"
    )
    assert find_study(str(tmp_path / "with_classes.py"), TINY).name == "figure4a"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi")
)
HOSTILE = {
    "nested": ("data: digits\nmethods: " + "[" * 3000 + "]" * 3000, "cannot read .*mine.yaml: .*recursion"),
    "nested a little": ("data: digits\nmethods: " + "[" * 30 + "]" * 30, "mine.yaml has lists .* more than 10 deep"),
    "inside itself": ("data: digits\nmethods: &a [*a]", "mine.yaml has lists .* inside themselves"),
    "a mapping inside itself": ("&x {data: digits, methods: [at], recipe: *x}", "inside themselves"),
    "a billion entries": (BOMB + "data: digits\nmethods: *i", "mine.yaml has more than 50000 entries"),
    "long": ("data: digits\nmethods: [" + "at, " * 100_000 + "]", "mine.yaml: it has 400024 bytes"),
    "many seeds": (
        "data: digits\nmethods: [at]\nseeds: 100000000",
        "seeds=100000000 must be at least 1 and at most 1000",
    ),
    "a long number": ("data: digits\nmethods: [at]\nseeds: " + "9" * 5000, "cannot read .*mine.yaml"),
    "a date that is none": ("data: digits\nmethods: [at]\ntitle: 2020-13-45", "cannot read .*mine.yaml"),
    "a tag": ("data: digits\nmethods: [at]\ntitle: !!timestamp x", "cannot read .*mine.yaml"),
    "an object": ("data: !!python/object/apply:os.system [x]\nmethods: [at]", "cannot read .*mine.yaml"),
    "epochs": ("data: digits\nmethods: [at]\nrecipe: {epochs: " + "9" * 30 + "}", "epochs=9+ is out of range"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_yaml_is_refused_in_a_line(tmp_path: Path, case: str):
    text, message = HOSTILE[case]
    with pytest.raises(UserError, match=message) as caught:
        read(text, tmp_path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "key", ["title", "data", "model", "recipe", "methods", "columns", "surrogate", "seeds", "figure"]
)
@pytest.mark.parametrize(
    "value", ["1", "-1.5", "true", "null", "nan", ".nan", "[]", "{}", "[[1]]", "{a: b}", "2020-01-01"]
)
def test_a_value_of_a_wrong_type_is_refused_or_read(tmp_path: Path, key: str, value: str):
    lines = {"data": "digits", "methods": "[at]", key: value}
    with suppress(UserError):
        read("\n".join(f"{name}: {text}" for name, text in lines.items()), tmp_path)


def test_a_command_bounds_the_seeds_as_well(tmp_path: Path):
    with pytest.raises(UserError, match="seeds=1001 must be at least 1 and at most 1000"):
        plan_jobs(read("data: digits\nmethods: [at]", tmp_path), 1001, runs=tmp_path, data_dir=None)
