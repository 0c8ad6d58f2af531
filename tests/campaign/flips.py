"""Damaged files: whatever befalls a file is refused in a line, said in the report, or without effect.

A file with a right checksum, or with none, is believed: of such files only tracebacks are violations.
"""

from __future__ import annotations

import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.campaign.child import Outcome, Trouble, run
from tests.campaign.damage import Damage, damage
from tests.campaign.kills import differences, make_photos
from tests.campaign.tally import Tally

_TINY = [
    "--model", "small-cnn(width=2)", "--recipe", "digits", "--epochs", "2", "--steps", "1", "--batch-size", "128",
    "--validation", "20", "--checkpoint-seconds", "0", "--device", "cpu",
]  # fmt: skip
_DIGITS = ["--data", "digits", "--subset", "384", *_TINY]
_HALF = ["train", "trades+lbgat", *_DIGITS, "--average", "ema", "--name", "half"]
_EVALUATE = ["evaluate", "runs/run", "--attacks", "pgd(steps=3)", "--batch-size", "20", "-n", "60", "--device", "cpu"]
_SAVED = [*_EVALUATE, "--save-examples"]
_TRANSFER = [*_EVALUATE, "--surrogate", "runs/other"]
_REPORT = ["report", "runs", "--out", "page.html", "--maps", "2"]
_GUEST = ["train", "trades+vfd", *_DIGITS, "--name", "taught", "--vanilla", "runs/other", "--allow-weak-guest"]
_FOLDER = ["train", "natural", "--data", "folder:photos", "--image-size", "8", *_TINY, "--name", "photos"]
_STUDY_FILE = """
data: digits
model: small-cnn(width=2)
recipe: {preset: digits, epochs: 1, steps: 1, batch_size: 256, subset: 384, validation: 40}
methods: [natural]
columns: [clean]
"""
_STUDY = ["study", "mine.yaml", "--device", "cpu", "--runs", "studied"]


@dataclass(frozen=True)
class Target:
    """Files of one kind, and the commands that read them."""

    name: str
    files: str
    """a glob below the prepared folder"""
    commands: Sequence[Sequence[str]]


TARGETS = (
    Target("training state", "runs/half/state.pt", [_HALF]),
    Target("weights", "runs/run/best.safetensors", [_EVALUATE]),
    Target("a guest's weights", "runs/other/best.safetensors", [_GUEST]),
    Target("a surrogate's weights", "runs/other/best.safetensors", [_TRANSFER]),
    Target("evaluation state", "runs/run/evaluations/.*.state", [_SAVED]),
    Target("crafted examples", "runs/other/transfer/*.safetensors", [_TRANSFER]),
    Target("run.json", "runs/run/run.json", [_EVALUATE, _REPORT]),
    Target("log.jsonl", "runs/run/log.jsonl", [_REPORT]),
    Target("records.jsonl", "runs/run/records.jsonl", [_EVALUATE, _REPORT]),
    Target("results", "runs/run/evaluations/best-*.json", [_REPORT, ["compare", "runs/run", "runs/run"]]),
    Target("saved examples", "runs/run/evaluations/best-*.npz", [_REPORT]),
    Target("diagnosis", "runs/run/diagnosis/*.json", [_REPORT]),
    Target("feature maps", "page-files/features/*.npz", [_REPORT]),
    Target("image cache", "cache/folder-*.npy", [_FOLDER]),
    Target("digests of the images a run has seen", "runs/run/trained_on.npy", [_EVALUATE]),
    Target("study.json", "studies/mine-tiny/study.json", [_STUDY]),
)


def flip_bits(flips: int, seed: int, folder: Path, tally: Tally, out_of_time: Any) -> None:
    """Damage files `flips` times, going through the kinds of files in turn, and look at what the commands say."""
    base, here = folder / "base", folder / "here"  # runs and caches know the path of their data, so all work is there
    _prepare(here)
    here.rename(base)
    for target in TARGETS:
        assert list(base.glob(target.files)), f"no {target.files}"
    references: dict[str, tuple[Path, Outcome]] = {}
    for trial in range(flips):
        if out_of_time():
            return
        target = TARGETS[trial % len(TARGETS)]
        luck = random.Random(f"{seed}:flip:{trial}")
        command = luck.choice(target.commands)
        if (key := " ".join(command)) not in references:
            shutil.copytree(base, here)
            outcome = run(command, here)
            references[key] = here.rename(folder / f"flip-reference-{len(references)}"), outcome
        shutil.copytree(base, here)
        file = luck.choice(sorted(here.glob(target.files)))
        others = [other for other in sorted(here.rglob(f"*{file.suffix}")) if _is_alike(file, other)]
        done = damage(file, others, luck)
        outcome = run(command, here)
        wrong = _judge(outcome, done, file, here, *references[key])
        tally.count(
            "flips", target.name, f"{seed}:flip:{trial}", f"{command[0]}, {done.what}: {wrong}" if wrong else ""
        )
        shutil.rmtree(here)


def _prepare(base: Path) -> None:
    """Make one of every file."""
    base.mkdir()
    (base / "mine.yaml").write_text(_STUDY_FILE)
    make_photos(base / "photos")
    for command in (
        ["train", "at", *_DIGITS, "--name", "run"], ["train", "natural", *_DIGITS, "--name", "other"],
        _SAVED, _TRANSFER, ["diagnose", "runs/run", "-n", "20", "--device", "cpu"], _REPORT, _FOLDER, _STUDY,
    ):  # fmt: skip
        outcome = run(command, base)
        assert outcome.code == 0, f"{command}: {outcome.err or outcome.out}"
    _stop_midway(_HALF, base, "runs/half/state.pt")
    for file in (base / "runs" / "run" / "evaluations").glob("best-*"):
        file.rename(file.with_name(f"kept-{file.name}"))
    _stop_midway(_SAVED, base, "runs/run/evaluations/.*.state")
    for file in (base / "runs" / "run" / "evaluations").glob("kept-*"):
        file.rename(file.with_name(file.name.removeprefix("kept-")))


def _stop_midway(command: Sequence[str], base: Path, state: str) -> None:
    """Kill a command while its state is on the disk."""
    for flush in range(1, 9):
        run(command, base, Trouble(dies_at=flush))
        if list(base.glob(state)):
            return
    raise AssertionError(f"{command} left no {state}")


def _is_alike(file: Path, other: Path) -> bool:
    """Tell whether another file is of the same kind, with other content."""
    alike = other.name == file.name or other.parent.name == file.parent.name
    return alike and other != file and other.is_file() and other.read_bytes() != file.read_bytes()


def _judge(outcome: Outcome, done: Damage, file: Path, here: Path, reference: Path, undamaged: Outcome) -> str:
    """Return what is wrong with how a command took a damaged file, or the empty string."""
    if outcome.has_traceback or outcome.code not in (0, 2):
        return f"traceback or exit code {outcome.code}: {outcome.err[-300:]}"
    if outcome.code == 2:
        named = file.name in outcome.err or file.parent.name in outcome.err
        return (
            "" if outcome.is_one_line and named else f"refused without naming the file in a line: {outcome.err[-300:]}"
        )
    if not done.sealed:
        return ""
    page = here / "page.html"
    said = file.name in outcome.out + outcome.err or (page.exists() and file.name in _absent(page))
    same = not list(differences(reference, here)) and _shown(outcome) == _shown(undamaged)
    same = same and (not page.exists() or _text(page) == _text(reference / "page.html"))
    return "" if same or said else "silent: another result, and not a word"


def _shown(outcome: Outcome) -> str:
    """Return what a command printed, without times and folders, and that a map which was not there is made."""
    shown = re.sub(r"^mapping the features .*\n", "", outcome.out, flags=re.MULTILINE)
    return re.sub(r"\d+ s\b|/\S+", "", shown)


def _text(page: Path) -> str:
    return re.sub(r"<[^>]*>", " ", page.read_text())


def _absent(page: Path) -> str:
    """Return the part of a report that says what is not here."""
    return page.read_text().partition("What is not here")[2]
