"""The README: its numbers are those of the committed records, its commands exist, its code runs."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from advalign.cli import commands as cli
from advalign.objectives import parse
from advalign.runs import read_records

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_current():
    spec = importlib.util.spec_from_file_location("refresh", ROOT / "results" / "refresh.py")
    assert spec is not None
    assert spec.loader is not None
    refresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(refresh)
    assert README.count("<!-- end of table -->") >= 2
    for page in refresh.PAGES:
        assert "<!-- end of table -->" in page.read_text()
        assert refresh.refreshed(page.read_text()) == page.read_text(), "run `python results/refresh.py`"


def test_set_up_and_tests_are_the_two_commands_of_ci():
    ci = (ROOT / ".ci" / "run").read_text()
    for command in (
        "venv .venv && .venv/bin/pip install -e . && .venv/bin/advalign demo",
        ".venv/bin/pip install -e '.[dev]' && .venv/bin/pytest",
    ):
        assert command in README
        assert all(part.replace("install -e", "install -q -e") in ci for part in command.split(" && ")), command


@pytest.mark.parametrize("line", re.findall(r"^advalign .+$", README, re.MULTILINE))
def test_commands_parse(line: str, monkeypatch: pytest.MonkeyPatch):
    reached = []
    for name, (options, _) in list(cli.COMMANDS.items()):
        monkeypatch.setitem(cli.COMMANDS, name, (options, reached.append))
    cli.main(shlex.split(line, comments=True)[1:])
    (options,) = reached
    if isinstance(options, cli.TrainOptions):
        parse(options.method)


def test_python_runs_as_shown(monkeypatch: pytest.MonkeyPatch):
    import advalign as aa

    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    nets = [aa.models.build("small-cnn(width=4)", classes=10) for _ in range(2)]
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8)
    optimizer = torch.optim.SGD(nets[0].parameters(), lr=0.1)
    before = nets[0].state_dict()["fc.weight"].clone()
    exec(code, {"net": nets[0], "vanilla": nets[1], "loader": [(x, y)], "optimizer": optimizer})
    assert not torch.equal(before, nets[0].state_dict()["fc.weight"])


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/**/records.jsonl")), ids=lambda path: path.parent.name)
def test_committed_records_are_whole(path: Path):
    records = read_records(path)
    assert records
    for record in records:
        assert 0 <= record.accuracy <= 1
        assert record.commit
        assert not record.commit.endswith("dirty")
        assert record.n * record.accuracy == pytest.approx(round(record.n * record.accuracy))


def test_the_version_is_one():
    from importlib.metadata import version

    assert f'version = "{version("advalign")}"' in (ROOT / "pyproject.toml").read_text()
    assert sys.version_info >= (3, 11)
