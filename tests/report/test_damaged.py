"""Reports over damaged folders: what cannot be read is named with its reason, and the rest is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from advalign.evaluation.diagnose_source import diagnose_source
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.report.report import report_on
from advalign.report.sources import find_sources
from advalign.training.recipes import Recipe
from advalign.training.train import train

RECIPE = Recipe(epochs=1, steps=1, batch_size=256, augment="none", eps=0.2, subset=300, validation=50)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs with everything that a report reads."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("natural", "at"):
        run = train(
            method, data="digits", model="small-cnn(width=2)", recipe=RECIPE, runs=root, name=method, device="cpu"
        )
        target = TargetOptions(n=40, eps=0.2, device="cpu")
        measure(run.path, ["fgsm", "pgd(steps=2)"], target, save_examples=True)
        diagnose_source(run.path, TargetOptions(n=10, device="cpu"))
    return root


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def edited(key: str, value: object) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, key: value}))

    return edit


def unsealed(key: str, value: object) -> Callable[[Path], None]:
    """A file as an earlier version wrote it, with something wrong in it."""

    def edit(file: Path) -> None:
        content = json.loads(file.read_text())
        del content["checksum"], content["format"]
        file.write_text(json.dumps({**content, key: value}))

    return edit


def of_the_other_run(pattern: str) -> Callable[[Path], object]:
    """The file of another run, sound as it is, put in a file's place."""

    def replace(file: Path) -> None:
        run = next(folder for folder in file.parents if folder.name == "at")
        (other,) = run.with_name("natural").glob(pattern)
        shutil.copyfile(other, file)

    return replace


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "run.json flipped": ("at/run.json", flipped, "is damaged"),
    "run.json newer": ("at/run.json", unsealed("format", 7), "newer version of advalign (format 7): upgrade advalign"),
    "run.json edited": ("at/run.json", edited("status", "running"), "was edited, its checksum does not fit"),
    "run.json of wrong types": ("at/run.json", unsealed("setting", {"method": 3}), "Expected `str`, got `int`"),
    "run.json of another setting": (
        "at/run.json", unsealed("setting", {"method": "at", "data": "digits", "model": "m"}), "its setting is that of",
    ),
    "run.json no text": ("at/run.json", lambda file: file.write_bytes(b"\xff\xfe\x00"), "is not text"),
    "run.json empty": ("at/run.json", lambda file: file.write_text(""), "is damaged"),
    "log": ("at/log.jsonl", flipped, "log.jsonl, line 1 is damaged"),
    "log of another run": ("at/log.jsonl", of_the_other_run("log.jsonl"), "or lines are missing or another run"),
    "log cut": ("at/log.jsonl", lambda file: file.write_text(file.read_text() * 2), "lines are missing"),
    "result of another run": ("at/evaluations/*.json", of_the_other_run("evaluations/*.json"), "belongs to run "),
    "diagnosis of another run": (
        "at/diagnosis/*.json", of_the_other_run("diagnosis/*.json"), "or is another run",
    ),
    "records cut": (
        "at/records.jsonl", lambda file: file.write_text("".join(file.read_text().splitlines(True)[:-1])),
        "lines are missing",
    ),
    "records of another run": ("at/records.jsonl", of_the_other_run("records.jsonl"), "has records of run "),
    "records empty": ("at/records.jsonl", lambda file: file.write_text(""), "it is empty"),
    "records flipped": ("at/records.jsonl", flipped, "records.jsonl, line "),
    "records of wrong types": (
        "at/records.jsonl", lambda file: file.write_text('{"accuracy": "high"}\n'), "records.jsonl, line 1 is damaged",
    ),
    "result flipped": ("at/evaluations/*.json", flipped, "is damaged"),
    "result of wrong length": ("at/evaluations/*.json", unsealed("outcomes", {"clean": "101"}), "are not 40 digits"),
    "result copied": (
        "at/evaluations/*.json", lambda file: shutil.copy(file, file.with_name("best-ffffffff.json")), "is a copy of ",
    ),
    "examples flipped": ("at/evaluations/*.npz", flipped, "is damaged, its checksum does not fit"),
    "examples a dead link": (
        "at/evaluations/*.npz", lambda file: (file.unlink(), file.symlink_to(file.name)), "Too many levels",
    ),
    "examples cut": ("at/evaluations/*.npz", lambda file: file.write_bytes(file.read_bytes()[:500]), "is damaged"),
    "diagnosis flipped": ("at/diagnosis/*.json", flipped, "is damaged"),
    "diagnosis of wrong types": ("at/diagnosis/*.json", unsealed("verdicts", 3), "Expected `array`, got `int`"),
}  # fmt: skip


SHOWN = [name for name in DAMAGES if name.startswith(("log", "examples"))]  # what the page's sections read


def damaged(name: str, runs: Path, folder: Path) -> tuple[Path, str]:
    """A copy of the runs with one file damaged; the file, and what is to be said of it."""
    shutil.copytree(runs, folder / "runs")
    pattern, damage, words = DAMAGES[name]
    (file,) = (folder / "runs").glob(pattern)
    damage(file)
    return file, words


@pytest.mark.parametrize("name", [name for name in DAMAGES if name not in SHOWN])
def test_what_cannot_be_read_is_named_and_the_rest_is_found(name: str, runs: Path, tmp_path: Path):
    file, words = damaged(name, runs, tmp_path)
    sources = find_sources([tmp_path / "runs"])
    assert "natural" in [record.method for record in sources.records]
    assert any(file.name in line and words in line for line in sources.unreadable), sources.unreadable


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_the_page_says_what_is_not_there(name: str, runs: Path, tmp_path: Path):
    file, words = damaged(name, runs, tmp_path)
    (table, *_) = report_on([tmp_path / "runs"], tmp_path / "page.html", maps=0)
    assert "natural" in [row[0] for row in table.rows]
    missing = (tmp_path / "page.html").read_text().partition("What is not here")[2].replace("&#34;", '"')
    assert file.name in missing
    assert words in missing


@pytest.mark.slow
def test_whole_folders_have_nothing_unreadable(runs: Path, tmp_path: Path):
    report_on([runs], tmp_path / "page.html", maps=0)
    assert "Not read" not in (tmp_path / "page.html").read_text()
