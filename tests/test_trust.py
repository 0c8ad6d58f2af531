"""Files are data, never programs: a canary at every entrance stays unsung unless its function was asked for by name."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import advalign as aa
from advalign.cli import commands as cli
from advalign.errors import UserError
from advalign.runs import Run
from advalign.runs.checkpoint import load_weights
from advalign.runs.formats import write_checked_json
from advalign.runs.run import setting_digest
from advalign.runtime.sealed import Owner, seal_npy, seal_safetensors
from advalign.training.recipes import digits
from advalign.training.train import train

CANARY = """
from pathlib import Path
Path("imported").touch()
from advalign.models import build

def make(classes, channels, file="called"):
    Path(file).touch()
    return build("small-cnn(width=4)", classes=classes, channels=channels)
"""
OWN = "canary_nets:make"
SPELLINGS = (
    OWN,
    f'{OWN}(file="other")',
    f" {OWN}",
    "subprocess:getoutput(cmd='touch called')",
    "os:remove(path='kept')",
    """mix(robust="small-cnn(width=4)", accurate="os:remove(path='kept')", weight=0.5)""",
    """(mix)(robust="os:remove(path='kept')", accurate="small-cnn(width=4)", weight=0.5)""",
    """\uff4dix(robust="small-cnn(width=4)", accurate="os:remove(path='kept')", weight=0.5)""",
    """normalized(model="\uff4dix(robust='os:remove', accurate='small-cnn', weight=0.5)", mean=(0.5,), std=(0.5,))""",
    """normalized(model="normalized(model=\'os:remove\', mean=(0.5,), std=(0.5,))", mean=(0.5,), std=(0.5,))""",
)
SETTINGS = ["--epochs", "1", "--steps", "1", "--batch-size", "256", "--recipe", "digits", "--device", "cpu"]
QUICK = ["--model", "small-cnn(width=4)", *SETTINGS]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """An evaluated run of a built-in network."""
    root = tmp_path_factory.mktemp("runs")
    recipe = digits().__class__(epochs=1, steps=1, batch_size=256, augment="none", eps=0.2)
    run = train("natural", data="digits", model="small-cnn(width=4)", recipe=recipe, runs=root, device="cpu")
    cli.main(["evaluate", str(run.path), "--attacks", "fgsm", "-n", "50", "--device", "cpu"])
    return run


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plain: Run):
    (tmp_path / "canary_nets.py").write_text(CANARY)
    (tmp_path / "kept").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("canary_nets", None)


def plant(run: Run, folder: Path, model: str, *, in_setting: bool = True) -> Path:
    """Copy a run whose weights, and whose run.json, name another network; everything else about them is right."""
    shutil.copytree(run.path, folder)
    content = json.loads((folder / "run.json").read_text())
    del content["checksum"], content["format"]
    if in_setting:
        content["setting"]["model"] = model
        content["id"] = setting_digest(content["setting"])
        write_checked_json(folder / "run.json", content)
        (folder / "records.jsonl").unlink()  # they belong to the run that was copied
    for file in folder.glob("*.safetensors"):
        rename_network(file, model, content["id"])
    digests = np.load(folder / "trained_on.npy")
    with (folder / "trained_on.npy").open("w+b") as file:
        np.save(file, digests)
        seal_npy(file, Owner(content["id"], ""))
    return folder


def rename_network(file: Path, model: str, run: str) -> None:
    state, card = load_weights(file)
    card = json.dumps({**card, "model": model, "run": run})
    file.write_bytes(seal_safetensors(state, {"card": card}, Owner(run, "")))


def assert_silent(here: Path) -> None:
    for file in ("imported", "called", "other"):
        assert not (here / file).exists(), file
    assert (here / "kept").exists()
    assert "canary_nets" not in sys.modules


ENTRANCES = {
    "evaluate run": ["evaluate", "evil"],
    "evaluate file": ["evaluate", "evil/best.safetensors"],
    "evaluate --weights": ["evaluate", "--weights", "evil/best.safetensors"],
    "evaluate last": ["evaluate", "evil", "--checkpoint", "last"],
    "surrogate": ["evaluate", "good", "--attacks", "fgsm", "--surrogate", "evil", "-n", "20"],
    "diagnose": ["diagnose", "evil", "-n", "20"],
    "transfer": ["transfer", "good", "evil", "--attack", "fgsm", "-n", "20"],
    "vanilla": ["train", "trades+vfd", "--data", "digits", "--vanilla", "evil", *QUICK],
    "vanilla file": ["train", "trades+vfd", "--data", "digits", "--vanilla", "evil/best.safetensors", *QUICK],
    "robust": ["train", "ard", "--data", "digits", "--robust", "evil", *QUICK],
    "extractor": ["train", "afa", "--data", "digits", "--extractor", "evil", *QUICK],
}


@pytest.mark.parametrize(
    ("name", "model"),
    [  # each entrance and each spelling once; all pairs as slow tests
        (name, model)
        if model == SPELLINGS[0] or name == next(iter(ENTRANCES))
        else pytest.param(name, model, marks=pytest.mark.slow)
        for name in ENTRANCES
        for model in SPELLINGS
    ],
)
def test_a_file_runs_no_function(name: str, model: str, here: Path, plain: Run, capsys: pytest.CaptureFixture[str]):
    plant(plain, here / "evil", model)
    shutil.copytree(plain.path, here / "good")
    with pytest.raises(SystemExit) as end:
        cli.main(ENTRANCES[name])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "a function that would be run" in said
    assert "--trust-model" in said
    assert_silent(here)


@pytest.mark.slow
@pytest.mark.parametrize("model", SPELLINGS)
def test_reports_and_python_run_none_either(model: str, here: Path, plain: Run, capsys: pytest.CaptureFixture[str]):
    evil = plant(plain, here / "evil", model, in_setting=False)
    for source in (evil, evil / "best.safetensors"):
        with pytest.raises(UserError, match="function that would be run"):
            aa.load(source)
    cli.main(["report", "evil", "--out", "page.html"])
    assert "function that would be run" in (here / "page.html").read_text()
    (result,) = (evil / "evaluations").glob("best-????????.json")
    cli.main(["compare", str(result), str(result)])
    assert_silent(here)


@pytest.mark.parametrize("key", ["model", "methods", "surrogate"])
def test_a_study_in_yaml_runs_none(key: str, here: Path, capsys: pytest.CaptureFixture[str]):
    lines = {
        "model": f"model: '{OWN}'\nmethods: [trades]",
        "methods": f"methods: [natural, {{method: trades, model: '{OWN}'}}]",
        "surrogate": f"methods: [trades]\nsurrogate: {{method: natural, model: '{OWN}'}}",
    }
    (here / "mine.yaml").write_text(f"data: digits\nrecipe: digits\n{lines[key]}\n")
    with pytest.raises(SystemExit) as end:
        cli.main(["study", "mine.yaml", "--dry-run"])
    assert end.value.code == 2
    assert "mine.yaml names its network as" in capsys.readouterr().err
    assert_silent(here)
    cli.main(["study", "mine.yaml", "--dry-run", "--trust-model"])
    assert (here / "imported").exists()


def test_a_study_builds_the_networks_it_declares_and_not_those_of_planted_files(here: Path, plain: Run):
    (here / "mine.yaml").write_text(
        "data: digits\nmodel: small-cnn(width=4)\nmethods: [natural]\ncolumns: [clean]\n"
        "recipe: {preset: digits, epochs: 1, batch_size: 256}\n"
    )
    cli.main(["study", "mine.yaml", "--device", "cpu"])
    (run,) = Path("runs").iterdir()
    shutil.rmtree(run / "evaluations")
    (run / "records.jsonl").unlink()
    for file in run.glob("*.safetensors"):
        rename_network(file, OWN, Run.read(run).id)
    cli.main(["study", "mine.yaml", "--device", "cpu"])
    assert_silent(here)


def test_what_the_user_types_or_trusts_is_called(here: Path, plain: Run):
    evil = plant(plain, here / "evil", OWN)
    for i, arguments in enumerate((
        ["evaluate", "evil", "--attacks", "none", "--trust-model"],
        ["evaluate", "evil", "--attacks", "none", "--model", OWN],
        ["evaluate", f"{OWN}@evil/best.safetensors", "--attacks", "none"],
    )):  # fmt: skip
        cli.main([*arguments, "-n", "20", "--device", "cpu"])
        assert (here / "called").exists(), i
        os.unlink(here / "called")
    for net in (aa.load(evil, trust_model=True), aa.load(evil, model=OWN)):
        assert isinstance(net, type(aa.models.build("small-cnn(width=4)", classes=10)))
    # A built-in network that the user types counts more than what the file says.
    os.unlink(here / "called")
    cli.main(["evaluate", "small-cnn(width=4)@evil", "--attacks", "none", "-n", "20", "--device", "cpu"])
    assert not (here / "called").exists()


@pytest.mark.slow
def test_a_run_of_ones_own_network_goes_on_by_its_own_command(here: Path, capsys: pytest.CaptureFixture[str]):
    command = ["train", 'trades+vfd(layer="layer3")', "--data", "digits", "--model", OWN, *SETTINGS]
    cli.main([*command, "--epochs", "2", "--time-budget", "0.001s"])
    cli.main([*command, "--epochs", "2"])
    said = capsys.readouterr().out
    (run,) = Path("runs").glob("trades*")
    assert Run.read(run).finished
    assert f"advalign evaluate {str(run)!r} --trust-model" in said
    cli.main(["evaluate", str(run), "--attacks", "none", "-n", "20", "--trust-model"])
    # The vanilla guest of another run of the same function: typed as the student's model, so called.
    (vanilla,) = Path("runs").glob("natural*")
    cli.main(
        ["train", 'hat+vfd(layer="layer3")', "--data", "digits", "--model", OWN, *SETTINGS, "--vanilla", str(vanilla)]
    )
