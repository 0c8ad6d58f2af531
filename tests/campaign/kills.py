"""Kills, signals and full disks: whenever a command is stopped, the same command goes on to the same result."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.campaign.child import CALM, Child, Outcome, Trouble, run
from tests.campaign.tally import Tally

_TINY = [
    "--data", "digits", "--model", "small-cnn(width=2)", "--recipe", "digits", "--epochs", "2", "--steps", "1",
    "--batch-size", "128", "--subset", "384", "--validation", "40", "--checkpoint-seconds", "0", "--device", "cpu",
]  # fmt: skip
_STUDY = """
data: digits
model: small-cnn(width=2)
recipe: {preset: digits, epochs: 1, steps: 1, batch_size: 256, subset: 384, validation: 40}
methods: [natural, at, trades+vfd]
columns: [clean, {heading: PGD, attack: pgd(steps=2), n: 100}, {heading: far, attack: fgsm, n: 100, black_box: true}]
surrogate: {method: natural, model: small-cnn(width=3)}
"""
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LARGEST = (100, 2000, 5000, 20_000, 100_000)  # bytes: less than a log, a record, weights, a state, a page have


@dataclass(frozen=True)
class Scenario:
    """A command that can be stopped at any time, after commands that make ready for it."""

    name: str
    command: Sequence[str]
    before: Sequence[Sequence[str]] = ()
    files: Sequence[tuple[str, str]] = ()
    """name and text of files that the command reads"""
    photos: bool = False
    """whether the command reads image files and generated images"""


def _train(method: str, *more: str) -> list[str]:
    return ["train", method, *_TINY, "--name", "run", *more]


_RUN = _train("at")
_OTHER = ["train", "natural", *_TINY, "--name", "other"]
SCENARIOS = (
    Scenario("train, guest on the way", _train("trades+vfd")),
    Scenario("train, AR-AT and SWA", _train("at+ar-at", "--average", "swa", "--average-start", "0.5")),
    Scenario("train, learnt guide and EMA", _train("trades+lbgat", "--average", "ema")),
    Scenario("train, AWP", _train("at+part", "--awp", "0.01")),
    Scenario("train, two teachers", _train("mtard")),
    Scenario("train, class means", _train("ikl")),
    Scenario(
        "evaluate",
        ["evaluate", "runs/run", "--attacks", "pgd(steps=3)", "worst(apgd-ce(steps=5), square(queries=20))",
         "--batch-size", "25", "-n", "200", "--device", "cpu", "--save-examples"],
        before=[_RUN],
    ),
    Scenario(
        "craft examples",
        ["evaluate", "runs/run", "--attacks", "pgd(steps=5)", "mim(steps=5)", "--surrogate", "runs/other",
         "--batch-size", "25", "-n", "200", "--device", "cpu"],
        before=[_RUN, _OTHER],
    ),
    Scenario(
        "diagnose", ["diagnose", "runs/run", "-n", "20", "--device", "cpu"], before=[_RUN],
    ),
    Scenario(
        "report", ["report", "runs", "--out", "page.html", "--maps", "1"],
        before=[_RUN, ["evaluate", "runs/run", "--attacks", "fgsm", "-n", "50", "--device", "cpu", "--save-examples"]],
    ),
    Scenario(
        "transfer matrix", ["transfer", "runs/run", "runs/other", "-n", "100", "--device", "cpu"],
        before=[_RUN, _OTHER],
    ),
    Scenario(
        "train on photos and generated images",
        ["train", "at", "--data", "folder:photos", "--image-size", "8", "--model", "small-cnn(width=2)", "--recipe",
         "digits", "--epochs", "2", "--steps", "1", "--batch-size", "16", "--validation", "10",
         "--checkpoint-seconds", "0", "--device", "cpu", "--extra", "extra.npz", "--name", "run"],
        photos=True,
    ),
    Scenario(
        "study", ["study", "mine.yaml", "--device", "cpu"], files=[("mine.yaml", _STUDY)],
    ),
)  # fmt: skip


def kill_commands(kills: int, seed: int, folder: Path, tally: Tally, out_of_time: Any) -> None:
    """Stop commands `kills` times, going through the scenarios in turn, and compare what they come to."""
    references: dict[str, tuple[Path, float]] = {}
    trial = 0
    while tally.tried("kills") < kills and not out_of_time():
        scenario = SCENARIOS[trial % len(SCENARIOS)]
        if scenario.name not in references:
            kept = folder / f"reference-{len(references)}"
            references[scenario.name] = kept, _reference(scenario, folder / "here")
            (folder / "here").rename(kept)  # runs know the path of their data, so all work is in one folder
        reference, seconds = references[scenario.name]
        _trial(scenario, reference, seconds, f"{seed}:{trial}", folder / "here", kills, tally)
        trial += 1


def _reference(scenario: Scenario, folder: Path) -> float:
    """Run a scenario undisturbed; return how long the command took."""
    _make_ready(scenario, folder)
    outcome = run(scenario.command, folder)
    assert outcome.code == 0, f"{scenario.name}: {outcome.err or outcome.out}"
    return outcome.seconds


def _make_ready(scenario: Scenario, folder: Path) -> None:
    folder.mkdir()
    for name, text in scenario.files:
        (folder / name).write_text(text)
    if scenario.photos:
        make_photos(folder / "photos")
        colours = np.random.default_rng(0)
        x, y = colours.integers(0, 256, (40, 8, 8, 3), np.uint8), np.arange(40) % 2
        np.savez_compressed(folder / "extra.npz", image=x, label=y)
    for command in scenario.before:
        outcome = run(command, folder)
        assert outcome.code == 0, outcome.err


def make_photos(root: Path) -> None:
    """Write image files of two classes, for training and for testing."""
    colours = np.random.default_rng(0)
    for part, count in (("train", 40), ("test", 6)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for k in range(count):
                Image.fromarray(colours.integers(0, 256, (8, 8, 3), np.uint8)).save(root / part / name / f"{k}.png")


def _trial(
    scenario: Scenario, reference: Path, seconds: float, seed: str, folder: Path, kills: int, tally: Tally
) -> None:
    """Stop one command a few times, let it end, and compare what it made with the undisturbed reference."""
    luck = random.Random(seed)
    _make_ready(scenario, folder)
    for _ in range(luck.randint(2, 6)):
        if tally.tried("kills") >= kills:
            break
        trouble = _draw(luck, seconds)
        twin = Child(scenario.command, folder, CALM, "-twin") if trouble.twin else None
        outcome = run(scenario.command, folder, trouble)
        wrong = _complaint(outcome, trouble)
        if twin is not None:
            wrong = wrong or _complaint(twin.wait(), Trouble(twin=True))
        tally.count("kills", scenario.name, seed, f"{trouble}: {wrong}" if wrong else "")
        if outcome.code == 0 and "Stopped" not in outcome.out:
            break
    end = run(scenario.command, folder, CALM)
    if end.code != 0:
        tally.count("resumed", scenario.name, seed, f"lost: exit code {end.code}: {(end.err or end.out)[-300:]}")
    else:
        differing = list(differences(reference, folder))
        left = [str(file.relative_to(folder)) for file in leftovers(folder)]
        wrong = f"unequal: {differing[:3]}" if differing else f"leftovers: {left[:3]}" if left else ""
        tally.count("resumed", scenario.name, seed, wrong)
    shutil.rmtree(folder)


def _draw(luck: random.Random, seconds: float) -> Trouble:
    twin = luck.random() < 0.15
    match luck.randrange(6):
        case 0:
            return Trouble(full_at=luck.randint(1, 12), twin=twin)
        case 1:
            return Trouble(dies_at=luck.randint(1, 12), twin=twin)
        case 2:
            return Trouble(largest=luck.choice(_LARGEST), twin=twin)
        case _:
            return Trouble(luck.choice(_SIGNALS), luck.uniform(0, seconds), twin=twin)


def _complaint(outcome: Outcome, trouble: Trouble) -> str:
    """Return what is wrong with how a stopped command ended, or the empty string."""
    if outcome.has_traceback:
        return f"traceback: {outcome.err[-300:]}"
    if outcome.code == 124:
        return "it did not end"
    if outcome.code == 2 and not outcome.is_one_line:
        return f"exit code 2 without one line: {outcome.err[-300:]}"
    if outcome.code == 2 and trouble.signal and not trouble.twin:
        return f"refused after a signal: {outcome.err[-300:]}"
    return ""


def leftovers(folder: Path) -> list[Path]:
    """Return the temporary files below a folder; locks are none."""
    hidden = [file for file in folder.rglob(".*") if file.is_file()]
    return [file for file in hidden if not file.name.endswith(".lock") and file.name != ".lock"]


def differences(reference: Path, folder: Path) -> Iterator[str]:
    """Yield what of a reference's results is another in a folder: weights, logs, records, outcomes; to the bit."""
    for file in sorted(reference.rglob("*")):
        name = file.relative_to(reference)
        other = folder / name
        result = file.suffix == ".json" and file.parent.name in ("evaluations", "diagnosis", "transfer")
        compared = result or file.name in ("log.jsonl", "records.jsonl")
        if file.suffix in (".safetensors", ".csv") and (not other.is_file() or file.read_bytes() != other.read_bytes()):
            yield str(name)
        if compared and (not other.is_file() or _plain(file) != _plain(other)):
            yield str(name)


_PASSING = {"seconds", "environment", "commit", "checksum", "command", "compile_seconds"}  # differ by nature


def _plain(file: Path) -> Any:
    """Return the JSON of a file without what differs from one run to the next; records in the order of their names."""
    try:
        text = file.read_text()
        if file.suffix != ".jsonl":
            return _without(json.loads(text))
        rows = [_without(json.loads(line)) for line in text.splitlines()]
    except (OSError, ValueError):  # damaged: equal to nothing
        return None
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without(each) for key, each in value.items() if key not in _PASSING}
    return [_without(each) for each in value] if isinstance(value, list) else value
