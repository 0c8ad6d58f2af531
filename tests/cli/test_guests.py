"""Networks beside the student on the command line: those that a user's own plug-in names, and what is misspelled."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest

from advalign.cli import commands as cli
from advalign.objectives import PLUGINS
from advalign.report.commands import train_line
from advalign.runs import Run
from advalign.training.recipes import digits
from advalign.training.train import train

MODEL = "small-cnn(width=2)"
QUICK = ["--recipe", "digits", "--epochs", "1", "--steps", "1", "--subset", "64", "--device", "cpu"]
BASE = ["train", "trades+follow", "--plugin", "my_peers:Follow", "--data", "digits", "--model", MODEL, *QUICK]
FOLLOW = """
from advalign.objectives.contract import ADV, Need, Term
from advalign.objectives.method import PlugIn


class Follow(PlugIn):
    name = "follow"
    PEERS = (Need("peer", "adv"), Need("elder", "adv"))
    needs = (ADV, *PEERS)

    def terms(self, outs, y):
        gaps = [(outs[ADV].logits - outs[peer].logits).square().mean() for peer in self.PEERS]
        return {"follow": Term(1.0, sum(gaps))}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with a plug-in that reads two networks by names of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_peers.py").write_text(FOLLOW)
    with patch.dict(PLUGINS):
        yield tmp_path


@pytest.mark.slow
def test_networks_of_a_plug_ins_own_names_are_given_by_name(here: Path, capsys: pytest.CaptureFixture[str]):
    recipe = replace(digits(), epochs=1, steps=1, subset=64)
    for name, model in (("peer", MODEL), ("elder", "small-cnn(width=3)")):
        train("natural", data="digits", model=model, recipe=recipe, name=name, device="cpu")
    cli.main([*BASE, "--guest", "peer=runs/peer", "--guest=elder=runs/elder/last.safetensors", "--name", "mine",
              "--allow-weak-guest"])  # fmt: skip
    run = Run.read(here / "runs" / "mine")
    assert run.finished
    assert set(run.log[0]["terms"]) == {"clean", "kl", "follow"}
    peer = Run.read(here / "runs" / "peer")
    assert run.setting["guests"]["peer"] == peer.id
    line = train_line(run, {peer.id: peer.path})
    assert f"--guest peer={peer.path} --guest elder=ELDER" in line.splitlines()[-1]
    words = shlex.split(line.splitlines()[-1].replace("PACKAGE.MODULE:CLASS", "my_peers:Follow"))[1:]
    capsys.readouterr()
    cli.main([word.replace("ELDER", "runs/elder/last.safetensors") for word in words])
    assert "finished before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "trades+follow needs a peer model, which has to be given: --guest peer=SOURCE"),
        (["--guest", "runs/peer"], "--guest 'runs/peer' must be NAME=SOURCE"),
        (["--guest", "=runs/peer"], "must be NAME=SOURCE"),
        (["--guest", "peer="], "must be NAME=SOURCE"),
        (["--guest", "pear=my_peers.py"], "takes no pear model; it needs peer, elder"),
        (["--guest", "peer=nowhere", "--guest", "elder=my_peers.py"], "no run folder or weights file 'nowhere'"),
        (["--guest", "peer=a", "--guest", "peer=b"], "the peer model is given twice: 'a' and 'b'"),
        (["--vanilla", "a", "--guest", "vanilla=b"], "the vanilla model is given twice"),
    ],
)
def test_what_is_no_network_is_refused(flags: list[str], words: str, here: Path, capsys: pytest.CaptureFixture[str]):
    before = sorted(here.rglob("*"))
    with pytest.raises(SystemExit) as end:
        cli.main([*BASE, *flags])
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert words in error
    assert error.count("\n") == 1
    assert [path for path in sorted(here.rglob("*")) if "__pycache__" not in str(path)] == before
