"""The command line: what bad input gets, which flags there are, and what the commands print and write."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from advalign.cli import commands as cli
from advalign.runs import Run, read_records
from advalign.training.recipes import digits
from advalign.training.train import train

MODEL = "small-cnn(width=4)"
QUICK = replace(digits(), epochs=1, steps=1, batch_size=128, subset=256)
BROKEN = {"nothing": "{}", "list": "[]", "no-setting": '{"status": "finished"}'}  # run.json


def snapshot(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, empty folders too."""
    files = sorted(folder.rglob("*"))
    return {str(file.relative_to(folder)): file.read_bytes() if file.is_file() else b"" for file in files}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must end with exit code 2 and one line on stderr; return the line."""
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    printed = capsys.readouterr()
    assert end.value.code == 2, printed.err
    assert printed.err.startswith("advalign: error: ")
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the user's files, good and bad."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ADVALIGN_DATA", raising=False)
    x, y = np.random.default_rng(0).random((40, 8, 8, 1)), np.arange(40) % 4
    np.savez("good.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.savez("bright.npz", x_train=3 * x, y_train=y, x_test=x, y_test=y)
    np.savez("keyless.npz", images=x)
    bytes_, more = (255 * x).astype(np.uint8), np.arange(40) % 5
    np.savez("few.npz", image=bytes_, label=y)
    np.savez("many.npz", image=bytes_, label=more)
    np.savez("wide.npz", image=np.concatenate([bytes_, bytes_[:, :1]], 1), label=y)
    Path("torn.npz").write_bytes(Path("good.npz").read_bytes()[:500])
    Path("empty").mkdir()
    torch.save(nn.Linear(2, 2).state_dict(), "linear.pt")
    torch.save({"hook": print}, "pickle.pt")
    Path("torn.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{torn")
    save_file({"weight": torch.zeros(2)}, "cardless.safetensors", metadata={"card": "[]"})
    Path("three.jsonl").write_text("3\n")
    for name, content in BROKEN.items():
        Path("broken", name).mkdir(parents=True)
        Path("broken", name, "run.json").write_text(content)
    Path("my_nets.py").write_text(
        "from torch import nn\n"
        "def make(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
        "def wrong(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))\n"
        "def nothing(classes): return None\n"
    )
    return tmp_path


@pytest.fixture
def trained(here: Path) -> Run:
    return train("at", data="digits", model=MODEL, recipe=QUICK, runs=here / "runs", name="done", device="cpu")


TRAIN = ["train", "trades", "--data", "digits", "--model", MODEL, "--recipe", "digits", "--device", "cpu"]


def with_(flag: str, value: str, base: list[str] = TRAIN) -> list[str]:
    at = base.index(flag) + 1 if flag in base else None
    return [*base[:at], value, *base[at + 1 :]] if at else [*base, flag, value]


def method(name: str) -> list[str]:
    return ["train", name, *TRAIN[2:]]


REFUSALS = {
    "command": (["trian"], "unknown command 'trian': did you mean 'train'"),
    "method": (method("tardes"), "unknown method 'tardes': did you mean 'trades'"),
    "plug-in": (method("trades+vdf"), "did you mean 'vfd'"),
    "argument": (method("trades(betta=6)"), "did you mean 'beta'"),
    "argument out of range": (method("trades(beta=-1)"), "beta=-1 must be at least 0"),
    "argument of the wrong type": (method("trades(beta=high)"), "beta='high' must be a number"),
    "parts that do not go together": (method("natural+vfd"), "'natural' makes none"),
    "layer": (method("trades+vfd(layer=layre3)"), "did you mean 'layer3'"),
    "model": (with_("--model", "resnet81"), "did you mean 'resnet18'"),
    "model's width": (with_("--model", "small-cnn(width=0)"), "width=0 must be at least 1"),
    "width twice": ([*TRAIN, "--width", "8"], "give the width once"),
    "no device": ([*TRAIN, "--devices", "0"], "devices=0 must be at least 1"),
    "one of two devices": ([*with_("--device", "cuda:1"), "--devices", "2"], "--device cuda:1 is one device, and 2"),
    "no GPU for each": (
        [*with_("--device", "cuda"), "--devices", "99"],
        "99 processes take a GPU each, and this machine",
    ),
    "own model's module": (with_("--model", "my_nest:make"), "my_nest"),
    "own model's function": (with_("--model", "my_nets:mak"), "did you mean 'make'"),
    "own model's classes": (with_("--model", "my_nets:wrong"), "model gives 7 logits, data has 10 classes"),
    "own model is no module": (with_("--model", "my_nets:nothing"), "not a torch.nn.Module"),
    "own model's layer": (
        ["train", "trades+vfd", *with_("--model", "my_nets:make")[2:]],
        "name the layer of Sequential to align, as in layer=NAME: choose from 0, 1, penultimate, logits",
    ),
    "data": (with_("--data", "cifar01"), "did you mean 'cifar10'"),
    "data folder": ([*with_("--data", "cifar10"), "--data-dir", "empty"], "empty"),
    "no images": (with_("--data", "folder:empty"), "empty"),
    "no folder": (with_("--data", "folder:nowhere"), "nowhere"),
    "images outside [0, 1]": (with_("--data", "npz:bright.npz"), "[0, 1]"),
    "torn npz": (with_("--data", "npz:torn.npz"), "torn.npz"),
    "npz without the arrays": (with_("--data", "npz:keyless.npz"), "x_train"),
    "recipe": (with_("--recipe", "digist"), "did you mean 'digits'"),
    "flag": ([*TRAIN, "--epcohs", "3"], "did you mean --epochs"),
    "flag's value": (with_("--epochs", "three"), "'three'"),
    "no data": (["train", "trades"], "--data"),
    "epochs": (with_("--epochs", "0"), "epochs=0 must be at least 1"),
    "learning rate": (with_("--lr", "-1"), "lr=-1 must be above 0"),
    "eps in pixels": (with_("--eps", "8"), "eps=8 must be in [0, 1]; for images in [0, 1] write 8/255"),
    "eps is no number": (with_("--eps", "8/x"), "'8/x' is not a number"),
    "norm": (with_("--norm", "l3"), "'l3'"),
    "norm with another's radius": (with_("--norm", "l2"), "--norm l2 needs its radius, --eps"),
    "norm with the default radius": (
        with_("--norm", "l2", with_("--recipe", "common")),
        "norm=l2 needs an eps of its own",
    ),
    "step in pixels": (
        with_("--step-size", "2"),
        "step_size=2 crosses the whole of Linf(0.2) in a step: for images in [0, 1] write 2/255",
    ),
    "radius that no image can use": (
        [*with_("--norm", "l2"), "--eps", "128"],
        "l2: eps=128 is more than any two images of shape (1, 8, 8) differ by, 8; for images in [0, 1] write 128/255",
    ),
    "schedule": (with_("--schedule", "cosin"), "'cosin'"),
    "validation": (with_("--validation", "5000"), "5000"),
    "subset": (with_("--subset", "5000"), "subset=5000 must be at most 1147"),
    "duration": (with_("--time-budget", "soon"), "'soon' is no duration"),
    "device": (with_("--device", "gpu"), "unknown device 'gpu'"),
    "extra data that are missing": ([*TRAIN, "--extra", "nowhere.npz"], "nowhere.npz: there is no such file"),
    "torn extra data": ([*TRAIN, "--extra", "torn.npz"], "torn.npz is not an .npz file, or is cut short"),
    "extra data without the arrays": ([*TRAIN, "--extra", "keyless.npz"], "must hold image and label"),
    "extra floats": ([*TRAIN, "--extra", "good.npz"], "x_train has float64 values; generated images are uint8"),
    "extra images of another size": (
        [*with_("--data", "npz:good.npz"), "--extra", "wide.npz"],
        "image has shape (40, 9, 8, 1), but with npz:",
    ),
    "extra labels of other classes": (
        [*with_("--data", "npz:good.npz"), "--extra", "many.npz"],
        "label has the label 4, but npz:",
    ),
    "extra share": ([*with_("--batch-size", "1"), "--extra", "few.npz"], "extra_share=0.7 of a batch of 1 is"),
    "guest that is missing": ([*method("trades+vfd"), "--vanilla", "nowhere"], "nowhere"),
    "guest nobody asked for": ([*TRAIN, "--vanilla", "linear.pt"], "takes no vanilla model"),
    "guest that does not fit": ([*method("trades+vfd"), "--vanilla", "linear.pt"], "linear.pt does not fit the model"),
    "guest that is a pickle": ([*method("trades+vfd"), "--vanilla", "pickle.pt"], "holds more than tensors"),
    "pickled network": (["evaluate", "pickle.pt"], "print); to keep a network, save `model.state_dict()`"),
    "torn weights": ([*method("trades+vfd"), "--vanilla", "torn.safetensors"], "torn.safetensors is damaged"),
    "guest with a foreign card": ([*method("trades+vfd"), "--vanilla", "cardless.safetensors"], "no JSON object"),
    "guest of a damaged run": ([*method("trades+vfd"), "--vanilla", "broken/list"], "list/run.json is damaged"),
    "name that leads elsewhere": ([*TRAIN, "--name", "../up"], "name='../up' must be one plain folder name"),
    "name that is no name": ([*TRAIN, "--name", "."], "name='.' must be one plain folder name"),
    "runs in a file": ([*TRAIN, "--runs", "linear.pt"], "linear.pt is not a folder"),
    "runs below a file": ([*TRAIN, "--runs", "linear.pt/deep/runs"], "linear.pt is not a folder"),
    "run that is a file": ([*TRAIN, "--runs", ".", "--name", "linear.pt"], "linear.pt is not a folder"),
    **{
        f"training into {name}": ([*TRAIN, "--runs", "broken", "--name", name], f"{name}/run.json is damaged")
        for name in BROKEN
    },
    **{f"evaluating {name}": (["evaluate", f"broken/{name}"], f"{name}/run.json is damaged") for name in BROKEN},
    "weights with a foreign card": (["evaluate", "cardless.safetensors"], "cardless.safetensors is damaged"),
    "no run": (["evaluate", "nowhere"], "no run folder or weights file 'nowhere'"),
    "no run folder": (["evaluate", "empty"], "has no run.json"),
    "weights of unknown kind": (
        ["evaluate", "linear.pt"],
        "write MODEL@linear.pt, as in resnet18@linear.pt, or --model",
    ),
    "nothing to evaluate": (["evaluate"], "name what to evaluate once"),
    "nothing to diagnose": (["diagnose"], "name what to diagnose once"),
    "diagnosis of two": (["diagnose", "a", "--weights", "b"], "name what to diagnose once"),
    "run after the attacks": (["evaluate", "--attacks", "fgsm", "empty"], "put 'empty' before --attacks"),
    "eps over nothing": (["evaluate", "empty", "--eps", "8/0"], "--eps: '8/0' is not a number: write a decimal"),
    "n in words": (["evaluate", "empty", "-n", "all"], "'all' is not a whole number"),
    "normalisation by half": (["evaluate", "linear.pt", "--mean", "0.3"], "--std is missing"),
    "fast beside attacks": (["evaluate", "empty", "--fast", "--attacks", "pgd"], "--fast takes the place of --attacks"),
    "until and n": (["evaluate", "linear.pt", "-n", "9", "--until", "1"], "give n=9 or until=1"),
    "one radius twice": (["evaluate", "linear.pt", "--eps", "0.1", "1/10"], "eps=0.1 is given twice"),
    "radii without attacks": (["evaluate", "linear.pt", "--eps", "1", "2", "--attacks", "none"], "name one"),
    "transfer of one": (["transfer", "linear.pt"], "at least two"),
    "transfer into a file": (["transfer", "linear.pt", "pickle.pt", "--out", "torn.npz"], "torn.npz is not a folder"),
    "attack plug-in that is missing": (["evaluate", "linear.pt", "--plugin", "my_nest:Attack"], "my_nest"),
    "attack plug-in that is none": (["evaluate", "linear.pt", "--plugin", "my_nets:make"], "derived from advalign."),
    "transfer with a missing plug-in": (
        ["transfer", "linear.pt", "pickle.pt", "--plugin", "x"],
        "package.module:Class",
    ),
    "transfer of what stops": (["transfer", "linear.pt", "pickle.pt", "--attack", "square"], "transfer fgsm, pgd, mim"),
    "records": (["report", "empty"], "no records"),
    "lines that are no records": (
        ["report", "three.jsonl"],
        "three.jsonl, line 1 is damaged or not of advalign: it is no JSON object",
    ),
    "report of nothing": (["report"], "name at least one"),
    "report's maps": (["report", "empty", "--maps", "-1"], "maps=-1 must be at least 0"),
    "list": (["list", "metods"], "did you mean 'methods'"),
    "study": (["study", "tabel1"], "unknown study 'tabel1': did you mean 'table1'"),
    "study's scale": (["study", "table1", "--scale", "tyni"], "unknown scale 'tyni': did you mean 'tiny'"),
    "study's executor": (["study", "table1", "--executor", "locla"], "unknown executor 'locla': did you mean 'local'"),
    "study's data": (["study", "table1", "--data-dir", "empty"], "empty"),
    "study's device": (["study", "table1", "--device", "gpu"], "unknown device 'gpu'"),
    "study's file": (["study", "nowhere.yaml"], "cannot read nowhere.yaml"),
    "study's function": (["study", "my_nets:mak"], "did you mean 'make'"),
    "study in a file": (["study", "my_nets.py"], "my_nets.py has no function study(scale)"),
    "study that is none": (["study", "my_nets:nothing"], "my_nets:nothing returns NoneType"),
    "study into a file": (["study", "table1", "--out", "linear.pt"], "linear.pt is not a folder"),
    "layers of what": (["list", "layers"], "name the model"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_bad_input_gets_one_line_and_changes_nothing(name: str, here: Path, capsys: pytest.CaptureFixture[str]):
    arguments, words = REFUSALS[name]
    before = snapshot(here)
    assert words in refused(capsys, arguments)
    assert {k: v for k, v in snapshot(here).items() if "__pycache__" not in k} == before


RUN_REFUSALS = {
    "attack": (["--attacks", "pdg"], "unknown attack 'pdg': did you mean 'pgd'"),
    "attack's argument": (["--attacks", "pgd(step=3)"], "did you mean 'steps'"),
    "attack's range": (["--attacks", "pgd(steps=0)"], "steps=0 must be at least 1"),
    "n": (["-n", "501"], "n=501 must be in 1 to 500"),
    "classes": (["--data", "npz:good.npz"], "wrong number of classes"),
    "checkpoint": (["--checkpoint", "bset"], "did you mean 'best'"),
    "radius": (["--eps", "-1/255"], "must be in [0, 1]"),
    "norm": (["--norm", "l3", "--eps", "0.1"], "unknown norm 'l3'"),
    "norm without its radius": (["--norm", "l2"], "--norm l2 needs its radius, --eps"),
}


@pytest.mark.parametrize("name", RUN_REFUSALS)
def test_bad_options_of_evaluate(name: str, here: Path, trained: Run, capsys: pytest.CaptureFixture[str]):
    arguments, words = RUN_REFUSALS[name]
    before = snapshot(here)
    assert words in refused(capsys, ["evaluate", "runs/done", *arguments])
    assert snapshot(here) == before


@pytest.mark.parametrize("command", ["evaluate nosuch", "train nosuch --data digits"])
def test_one_process_speaks_whatever_rank_a_cluster_gives_it(
    command: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    assert "nosuch" in refused(capsys, command.split())


def test_a_run_folder_that_holds_something_else(here: Path, trained: Run, capsys: pytest.CaptureFixture[str]):
    (here / "runs" / "diary").mkdir()
    (here / "runs" / "diary" / "monday.txt").write_text("rain")
    before = snapshot(here)
    arguments = [*TRAIN, "--runs", "runs", "--name", "done"]
    assert "runs/done holds another run (method is 'at' there and 'trades' here" in refused(capsys, arguments)
    assert "is no run of advalign" in refused(capsys, [*TRAIN, "--runs", "runs", "--name", "diary"])
    assert snapshot(here) == before


def test_a_damaged_state_is_named(here: Path, capsys: pytest.CaptureFixture[str]):
    arguments = [*TRAIN, "--name", "stopped", "--epochs", "40", "--time-budget", "0.2s", "--runs", "runs"]
    cli.main(arguments)
    assert not Run.read(here / "runs" / "stopped").finished
    state = here / "runs" / "stopped" / "state.pt"
    whole = state.read_bytes()
    torch.save({}, here / "nothing.pt")
    for damaged in (whole[:1000], (here / "nothing.pt").read_bytes(), (here / "linear.pt").read_bytes()):
        state.write_bytes(damaged)
        before = snapshot(here)
        capsys.readouterr()
        assert "state.pt is damaged" in refused(capsys, arguments)
        assert snapshot(here) == before


def test_a_full_disk_is_noticed_before_work_starts(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 5000, 5000))
    assert "no space for runs" in refused(capsys, TRAIN)
    assert not (here / "runs").exists()


def test_a_download_without_network_says_what_to_do(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    import requests

    def offline(*args: object, **kwargs: object) -> None:
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(requests, "get", offline)
    monkeypatch.setattr(requests.Session, "request", offline)
    assert "--data-dir" in refused(capsys, with_("--data", "cifar10"))


@pytest.mark.slow
def test_train_evaluate_report_end_to_end(here: Path, capsys: pytest.CaptureFixture[str]):
    cli.main([*method("trades+vfd"), "--epochs", "2", "--subset", "256", "--name", "mine"])
    assert "advalign evaluate" in capsys.readouterr().out
    cli.main(["evaluate", "runs/mine", "--attacks", "fgsm", "pgd(steps=5)", "-n", "100", "--device", "cpu"])
    assert "worst case" in capsys.readouterr().out
    records = read_records(here / "runs" / "mine" / "records.jsonl")
    assert [record.attack for record in records] == ["clean", "fgsm", "pgd(steps=5)", "worst(fgsm, pgd(steps=5))"]
    assert {record.n for record in records} == {100}
    (result,) = (here / "runs" / "mine" / "evaluations").glob("*.json")
    outcomes = json.loads(result.read_text())["outcomes"]
    withstood = sum(all(image == "1" for image in images) for images in zip(*outcomes.values(), strict=True))
    right = [*(outcome.count("1") for outcome in outcomes.values()), withstood]
    assert [*outcomes] == ["clean", "fgsm", "pgd(steps=5)"]
    assert [round(record.accuracy * 100) for record in records] == right
    assert result.with_suffix(".md").exists()
    assert result.with_suffix(".html").read_text().startswith("<!doctype html>")
    cli.main(["report", "runs", "--out", "page.html"])
    page = (here / "page.html").read_text()
    assert "trades+vfd" in page
    assert "http" not in page.replace("http-equiv", "")  # one file that opens offline


def test_weights_from_elsewhere(here: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(0)
    sys.path.insert(0, str(here))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    torch.save({"state_dict": net.state_dict()}, "mine.pt")
    cli.main(
        ["evaluate", "mine.pt", "--model", "my_nets:make", "--data", "digits", "--eps", "0.1", "--attacks", "fgsm"]
    )
    assert "fgsm" in capsys.readouterr().out
    (result,) = (here / "evaluations").glob("mine-*.json")
    content = json.loads(result.read_text())
    from advalign.data import load

    test = load("digits").test
    with torch.no_grad():
        clean = (net(test.floats()).argmax(1) == test.labels).double().mean().item()
    assert content["records"][0]["accuracy"] == pytest.approx(clean)


@pytest.mark.slow
def test_compare_reads_results_and_not_the_cards_beside_them(
    here: Path, trained: Run, capsys: pytest.CaptureFixture[str]
):
    other = train("natural", data="digits", model=MODEL, recipe=QUICK, runs=here / "runs", name="other", device="cpu")
    for run in (trained, other):
        cli.main(["evaluate", str(run.path), "--attacks", "autoattack", "-n", "10", "--eps", "0.05"])
        printed = capsys.readouterr().out
        (card,) = (run.path / "evaluations").glob("*.robustbench.json")
        assert ".html, .robustbench.json" in printed.splitlines()[-1]
        assert json.loads(card.read_text())["reported"] is None
    cli.main(["compare", "runs/done", "runs/other"])
    printed = capsys.readouterr().out
    assert "worst case" in printed
    assert "runs/done (best)" in printed.replace("\n", " ")


def test_cw_is_shown_with_its_distance_and_said_to_stand_apart(
    here: Path, trained: Run, capsys: pytest.CaptureFixture[str]
):
    cli.main(["evaluate", "runs/done", "--attacks", "fgsm", "cw(steps=50, c=1000)", "-n", "20", "--save-examples"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "no part of the worst case" in line)
    (result,) = (here / "runs" / "done" / "evaluations").glob("*.json")
    far = json.loads(result.read_text())["distances"]["cw(c=1000, steps=50)"]
    assert line.startswith(f"cw(c=1000, steps=50): the images that fool lie at a mean L2 distance of {far:.3f}")
    assert lines[-1].endswith(".md, .tex, .html, .npz")


def test_transfer_writes_the_matrix(here: Path, trained: Run, capsys: pytest.CaptureFixture[str]):
    train("natural", data="digits", model=MODEL, recipe=QUICK, runs=here / "runs", name="other", device="cpu")
    cli.main(["transfer", "runs/done", "runs/other", "--attack", "fgsm", "-n", "20"])
    (matrix,) = (here / "transfer").glob("*.json")
    assert f"Written: transfer/{matrix.name} (per image), .md, .tex" in capsys.readouterr().out
    assert not (here / "runs" / "done" / "records.jsonl").exists()


@pytest.mark.parametrize(
    "what", ["methods", "attacks", "models", "data", "recipes", "studies", "zoo", "layers resnet18"]
)
def test_lists(what: str, capsys: pytest.CaptureFixture[str]):
    cli.main(["list", *what.split()])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) > 2
    expected = {
        "methods": "+vfd",
        "layers resnet18": "layer4",
        "recipes": "common",
        "models": "vgg16",
        "attacks": "worst(ATTACK,",
        "studies": "figure4b",
        "zoo": "cifar100/Wang2023Better_WRN-28-10",
    }
    assert any(row.split()[0] == expected.get(what, "digits") for row in rows)


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    assert end.value.code == 0
    shown = {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--")}
    return {flag for flag in shown if flag[2:3].isalpha() and not flag.startswith("--no-")}


def test_flags_are_the_declared_ones(capsys: pytest.CaptureFixture[str]):
    """A new flag is a decision: it is added here too."""
    assert flags_of("study", capsys) == {
        "--help", "--scale", "--seeds", "--time-budget", "--executor", "--gpus", "--plugin", "--dry-run", "--out",
        "--trust-model", "--runs", "--data-dir", "--device",
    }  # fmt: skip
    assert flags_of("train", capsys) == {
        "--help", "--data", "--model", "--width", "--recipe", "--vanilla", "--robust", "--extractor", "--guest",
        "--allow-weak-guest", "--init", "--plugin", "--trust-model", "--runs", "--name", "--data-dir",
        "--label-smoothing", "--awp", "--awp-start", "--average", "--average-start",
        "--batchnorm-momentum", "--batchnorm-passes", "--ema-decay", "--ema-epochs", "--ema-constant",
        "--eps-ramp", "--swa-every", "--extra", "--extra-share",
        "--image-size", "--device", "--time-budget", "--checkpoint-seconds", "--cuda-graphs",
        "--devices", "--sync-bn", "--tensorboard",
        "--epochs", "--batch-size", "--lr", "--lr-factor", "--schedule", "--milestones", "--peak", "--cycle-momentum",
        "--warmup", "--momentum", "--nesterov", "--weight-decay", "--clip-norm", "--augment", "--norm", "--eps",
        "--attack", "--steps", "--step-size", "--start", "--mode", "--guard", "--validation", "--validate-every",
        "--subset", "--precision",
        "--compile", "--seed",
    }  # fmt: skip


FLAGS = {
    "evaluate": {
        "--weights", "--attacks", "--checkpoint", "--data", "--model", "--n", "--norm", "--eps", "--batch-size",
        "--precision", "--seed", "--data-dir", "--image-size", "--surrogate", "--quantize", "--mean", "--std",
        "--corruptions", "--fast", "--until", "--device", "--out", "--save-examples", "--trust-model", "--plugin",
    },
    "diagnose": {
        "--weights", "--checkpoint", "--data", "--model", "--n", "--norm", "--eps", "--batch-size", "--seed",
        "--data-dir", "--image-size", "--mean", "--std", "--device", "--out", "--trust-model",
    },
    "compare": {"--checkpoint"},
    "transfer": {
        "--attack", "--data", "--n", "--norm", "--eps", "--data-dir", "--device", "--out", "--trust-model", "--plugin",
    },
    "report": {"--out", "--data-dir", "--maps", "--trust-model"},
}  # fmt: skip


@pytest.mark.parametrize("command", FLAGS)
def test_flags_of_the_other_commands_are_the_declared_ones(command: str):
    options, _ = cli.COMMANDS[command]
    positional = {"source", "first", "second", "sources", "paths"}
    assert {"--" + field.name.replace("_", "-") for field in fields(options) if field.name not in positional} == FLAGS[
        command
    ]


def test_help_needs_no_torch():
    code = "import sys; from advalign.cli import commands; commands.main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in cli.COMMANDS)


@pytest.mark.slow
def test_a_pipe_that_closes_early_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m advalign list methods | head -1", shell=True, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("natural")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "report --nothing {}",
        "report --{} x",
        "{}",
        "train at --schedule {}",
        "report --x {} --y {}",
        "report a " + "--x ab " * 9000,
    ],
)
def test_what_was_typed_is_shortened_in_the_line(words: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(words.format("x" * 100_000, "y" * 100_000).split())
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("advalign: error: ")
    assert len(line) < 1200


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train at --data digits --epochs two", "--epochs: 'two' is not a whole number"),
        ("train at --data digits --seed 1e3", "--seed: '1e3' is not a whole number"),
        ("train at --data digits --validation x", "--validation: 'x' is not a whole number"),
        ("train at --data digits --eps x", "--eps: 'x' is not a number: write a decimal or a fraction, as in 8/255"),
        (
            "train at --data digits --clip-norm 1,5",
            "--clip-norm: '1,5' is not a number: write a decimal or a fraction,",
        ),
        ("train at --data digits --milestones 0.5 x", "--milestones: '0.5', 'x' are not numbers: write decimals or"),
        (
            "evaluate runs/a --mean 0.5,0.5",
            "--mean: '0.5,0.5' are not numbers: write decimals or fractions, with spaces",
        ),
        ("evaluate runs/a -n many", "-n/--n: 'many' is not a whole number"),
        ("evaluate runs/a --batch-size 1k", "--batch-size: '1k' is not a whole number"),
        ("diagnose runs/a -n 1.0", "-n/--n: '1.0' is not a whole number"),
        ("study demo --gpus x", "--gpus: 'x' is not a number: write a decimal or a fraction, as in 8/255"),
        ("report runs --maps few", "--maps: 'few' is not a whole number"),
    ],
)
def test_what_is_no_number_is_said_with_its_flag(words: str, said: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith(f"advalign: error: {said}")


@pytest.mark.parametrize("words", [["demo", "--time-budget", ""], ["evaluate", ""], ["train", "at", "--name", " "]])
def test_empty_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    assert end.value.code == 2
    assert f"{words[-2]} is followed by an empty word: name a value" in capsys.readouterr().err
