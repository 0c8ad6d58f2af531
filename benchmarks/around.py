"""What is not training: `python -m benchmarks.around --data-dir DIR`, some minutes on two CPU cores.

How long a report over 500 runs takes, which are fabricated from two small ones on digits; how long `advalign train` on
CIFAR-10 takes from the start of the process to its first step, beside `import torch`; and which share of a training the
validations are, by recipe, on resnet18(width=16): the time of a step and of a validation, counted over an epoch. In the
validation that is timed every image is attacked to the last step, as of a network that is never fooled; of a real one
fooled images leave early. Writes results/benchmarks/around.json.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, run
from tempfile import TemporaryDirectory
from typing import Any

import torch
import tyro
from rich.console import Console

from advalign import models
from advalign.attacks import PGD
from advalign.data import Images
from advalign.evaluation.accuracy import evaluate
from advalign.objectives import Objective, parse
from advalign.runs import Run
from advalign.runtime.device import to_device
from advalign.runtime.environment import environment
from advalign.runtime.seeds import seeded
from advalign.training.recipes import RECIPES, Recipe
from advalign.training.step import Step
from benchmarks.fabricated import fabricate
from benchmarks.timing import Way, in_turn

CPU = torch.device("cpu")
METHOD, MODEL, VALIDATED = "trades", "resnet18(width=16)", 1000
TRAINED = {"cpu": (10_000, 45_000), "short": (45_000,), "common": (45_000,)}
"""The numbers of training images for which the share is counted, by recipe."""
FIRST_STEP = """
import os, sys
from advalign.training import loop
loop._Trainer.train_step = lambda *batch: os._exit(0)
from advalign.cli.commands import main
main(sys.argv[1:])
sys.exit("no step was made")
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time what is not training."""

    data_dir: Path
    """where CIFAR-10 lies"""
    runs: int = 500
    """runs of the report"""
    rounds: int = 3
    """rounds that count, each way once in each"""
    out: Path = Path("results/benchmarks")
    """folder of the results"""


def report(count: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of `advalign report` over so many runs; the maps of features exist from the warm-up on."""
    with TemporaryDirectory() as name:
        root, sources, runs = Path(name), [], Path(name, "runs")
        for method in (METHOD, f"{METHOD}+vfd"):
            few = ("--recipe", "digits", "--epochs", "3", "--model", "small-cnn(width=4)", "--runs", str(root / "few"))
            _advalign("train", method, "--data", "digits", *few)
        for folder in sorted((root / "few").glob(f"{METHOD}*")):
            _advalign("evaluate", str(folder), "--attacks", "fgsm", "pgd", "mim", "--n", "500")
            sources.append(Run.read(folder))
        runs.mkdir()
        fabricate(sources, runs, count)
        way = partial(_advalign, "report", str(runs), "--out", str(root / "report.html"))
        return {"runs": count, "seconds": _medians({"report": way}, rounds)["report"]}


def startup(data_dir: Path, rounds: int) -> dict[str, float]:
    """Return the seconds from the start of a process to its first step, and those of `import torch`."""
    with TemporaryDirectory() as name:

        def first_step() -> None:
            with TemporaryDirectory(dir=name) as runs:  # a new one, since a second training would resume
                where = ("--data", "cifar10", "--data-dir", str(data_dir), "--runs", runs)
                words = ["train", METHOD, *where, "--model", "small-cnn(width=16)", "--recipe", "cpu"]
                _python("-c", FIRST_STEP, *words)

        return _medians({"import torch": lambda: _python("-c", "import torch"), "first step": first_step}, rounds)


def validation(recipe: Recipe, trained: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of a step and of a validation, and the share of the validations in a training."""
    with seeded("around"):
        student = models.build(MODEL, classes=10)
        x, pixels = torch.rand(recipe.batch_size, 3, 32, 32), torch.randint(256, (VALIDATED, 3, 32, 32))
    objective = to_device(Objective(parse(METHOD), copy.deepcopy(student), {}), CPU).train()
    steps = trained // recipe.batch_size
    step, y = Step(objective, recipe, steps, CPU), torch.arange(len(x)) % 10
    x = x.contiguous(memory_format=torch.channels_last)
    images = pixels.to(torch.uint8)
    with torch.no_grad():  # labels that the network assigns itself, so that every image is attacked
        labels = to_device(student, CPU).eval()(images / 255).argmax(1)
    attack = PGD(recipe.threat, steps=10, until_fooled=False)

    def update() -> None:
        objective.train()
        step.schedule(0)
        step.update(x, step.perturb(x, y, None), y, None)

    def validate() -> None:
        found = evaluate(student, Images(images, labels), [attack])
        assert found.passes[str(attack)].backward == 10 * VALIDATED, "images were left out of the attack"

    seconds = _medians({"step": update, "validation": validate}, rounds)
    every = recipe.validate_every * steps * seconds["step"]
    return {"trained": trained, **seconds, "share": round(seconds["validation"] / (every + seconds["validation"]), 4)}


def _medians(ways: dict[str, Way], rounds: int) -> dict[str, float]:
    return {name: round(statistics.median(times), 3) for name, times in in_turn(ways, rounds, CPU).items()}


def _advalign(*words: str) -> None:
    _python("-m", "advalign", *words)


def _python(*words: str) -> None:
    run([sys.executable, *words], check=True, stdout=DEVNULL, stderr=DEVNULL)


def main(options: Options) -> None:
    """Measure, print, and write."""
    console, load = Console(), os.getloadavg()[0]
    content: dict[str, Any] = {"rounds": options.rounds, "load_before": load, "environment": environment()}
    content["startup"] = startup(options.data_dir, options.rounds)
    console.print(content["startup"])
    content["report"] = report(options.runs, options.rounds)
    console.print(content["report"])
    content["validation"] = []
    for name, sizes in TRAINED.items():
        for trained in sizes:
            entry = {"recipe": name, **validation(replace(RECIPES[name](), subset=None), trained, options.rounds)}
            content["validation"].append(entry)
            console.print(entry)
    file = options.out / "around.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"Written: {file}")


if __name__ == "__main__":
    main(tyro.cli(Options))
