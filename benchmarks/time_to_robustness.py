"""What a robust model costs: `python -m benchmarks.time_to_robustness --data-dir DIR`.

The same network is trained by each way of making adversarial images, for as many epochs or, from the natural network's
weights, for a few, and measured by AutoAttack on 1,000 test images. Runs and evaluations are kept below `--work`,
so that a second call goes on where the first stopped; a call with other ways or seeds adds to the result.

Time is the number of steps times the time of one, which all ways take in turn in one process, so that what else the
machine does favours none; validation and start-up are left out. Passes are the student's, forward and backward, where a
backward pass counts for two, in epochs of natural training. Writes results/benchmarks/time-to-robustness-SCALE.json and
a figure.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from advalign.data import load
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.objectives import parse
from advalign.objectives.passes import count_passes
from advalign.report.figures import STYLE
from advalign.runs import Run
from advalign.runtime.device import one_thread
from advalign.runtime.environment import environment
from advalign.training.attacks import training_attack
from advalign.training.loop import _Trainer
from advalign.training.planning import plan
from advalign.training.recipes import Recipe, cpu, finetune
from advalign.training.train import train
from benchmarks.timing import Way, in_turn

EPS = 8 / 255
BASELINE = "PGD-10"
WAYS: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "PGD-5": {"steps": 5},
    "PGD-2": {"steps": 2, "step_size": EPS},
    "2:5:10": {"steps": "2:5:10"},
    "N-FGSM": {"attack": "n-fgsm"},
    "FGSM-RS": {"attack": "fgsm-rs"},
    "free, m=8": {"attack": "free"},
    "ATTA-1": {"attack": "atta"},
    "FGSM-PGI": {"attack": "fgsm-pgi", "plugin": "pgi"},
    "PGD-10 from natural": {"init": True},
    "N-FGSM from natural": {"init": True, "attack": "n-fgsm"},
}
"""What each way changes of the recipe; `init`: the recipe of fine-tuning, from the natural network's weights; `plugin`:
what joins the method."""
SCALES: dict[str, tuple[str, Recipe]] = {
    "tiny": ("small-cnn(width=16)", replace(cpu(), epochs=12, steps=10, validate_every=3)),
    "small": ("resnet18(width=16)", replace(cpu(), epochs=20, steps=10, subset=45_000, precision="bf16")),
}
SHORT = 4
"""Of fine-tuning, one epoch for so many of the whole training."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Train one network in every way, and measure it."""

    work: Path
    """folder of the runs"""
    data_dir: Path
    """folder of the CIFAR files"""
    scale: Literal["tiny", "small"] = "tiny"
    """tiny: a small network and 10,000 images; small: resnet18(width=16) and 45,000 images, hours a run"""
    methods: tuple[str, ...] = ("trades", "trades+vfd")
    """what is trained"""
    ways: tuple[str, ...] = tuple(WAYS)
    """of making adversarial images"""
    seeds: tuple[int, ...] = (0, 1, 2)
    """of the trainings"""
    n: int = 1000
    """test images under AutoAttack"""
    rounds: int = 5
    """of timing the steps"""
    device: str = "cpu"
    """auto, cpu, cuda"""
    out: Path = Path("results/benchmarks")
    """folder of the result"""


def recipe_of(scale: str, way: str, seed: int) -> Recipe:
    """Return the recipe of a way."""
    _, whole = SCALES[scale]
    changes = {key: value for key, value in WAYS[way].items() if key not in ("init", "plugin")}
    if "init" in WAYS[way]:
        short = finetune()
        whole = replace(
            short, epochs=max(1, whole.epochs // SHORT), subset=whole.subset, precision=whole.precision,
            validate_every=whole.validate_every,
        )  # fmt: skip
    return replace(whole, seed=seed, **changes)


def method_of(method: str, way: str) -> str:
    """Return the method, with what joins it in this way."""
    return f"{method}+{plugin}" if (plugin := WAYS[way].get("plugin")) else method


def trained(options: Options, method: str, way: str, seed: int, console: Console) -> Run:
    """Train a run, and first the natural network of its seed; a finished one is returned as it is."""
    natural = trained_natural(options, seed, console)
    guests = {"vanilla": natural.path} if "vanilla" in parse(method).guests else {}
    init = natural.path if "init" in WAYS[way] else None
    recipe = recipe_of(options.scale, way, seed)
    return _train(options, method_of(method, way), recipe, console, guests=guests, init=init)


def trained_natural(options: Options, seed: int, console: Console) -> Run:
    """Train the natural network of a seed."""
    return _train(options, "natural", recipe_of(options.scale, BASELINE, seed), console)


def _train(options: Options, method: str, recipe: Recipe, console: Console, **sources: Any) -> Run:
    run = train(
        method, data="cifar10", model=SCALES[options.scale][0], recipe=recipe, runs=options.work / options.scale,
        data_dir=options.data_dir, device=options.device, console=console, **sources,
    )  # fmt: skip
    if not run.finished:
        raise SystemExit(f"stopped in {run.path}: the same command goes on")
    return run


def accuracies(options: Options, run: Run, console: Console) -> dict[str, float]:
    """Return clean accuracy and that under AutoAttack, in per cent; what is on record is not measured again."""
    target = TargetOptions(n=options.n, data_dir=options.data_dir, device=options.device, norm="linf", eps=EPS)
    records = [each for each in run.records if each.n == options.n]
    if not {"clean", "autoattack"} <= {each.attack for each in records}:
        records = measure(run.path, ["autoattack"], target, console=console).records
    found = {each.attack: 100 * each.accuracy for each in records}
    return {"clean": found["clean"], "autoattack": found["autoattack"]}


def passes_of(method: str, recipe: Recipe) -> float:
    """Return the student's passes of a training step, a backward one for two forward ones."""
    forward, backward = count_passes(parse(method))
    attack = training_attack(recipe)
    made = statistics.mean(recipe.all_steps) if recipe.attack == "pgd" else attack.passes
    return forward - 10 + made + 2 * (backward - 10 + made)


def step_seconds(options: Options, method: str, natural: Run) -> dict[str, float]:
    """Return the median time of a training step of each way, all timed in turn."""
    model, _ = SCALES[options.scale]
    device, dataset = torch.device(options.device), load("cifar10", directory=options.data_dir)
    guests = {"vanilla": natural.path} if "vanilla" in parse(method).guests else {}
    steps: dict[str, Way] = {}
    for way in options.ways:
        recipe = recipe_of(options.scale, way, seed=0)
        planned = plan(
            parse(method_of(method, way)), dataset, model, recipe, runs=options.work / "timing", guests=guests
        )
        trainer = _Trainer(planned, device, cuda_graphs=False)
        trainer.start_epoch()
        batches = trainer.remaining_batches()
        steps[way] = lambda trainer=trainer, batches=batches: trainer.train_step(next(batches))
    return {way: statistics.median(times) for way, times in in_turn(steps, options.rounds, device).items()}


def main(options: Options) -> None:
    """Train, measure, print, and write after each run."""
    console, file = Console(), options.out / f"time-to-robustness-{options.scale}.json"
    content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"runs": {}, "step_seconds": {}}
    model, whole = SCALES[options.scale]
    for method in options.methods:
        natural = trained_natural(options, seed=0, console=console)
        steps = (whole.subset or 0) // whole.batch_size
        content["step_seconds"].setdefault(method, {}).update(step_seconds(options, method, natural))
        for seed in options.seeds:
            for way in options.ways:
                recipe = recipe_of(options.scale, way, seed)
                run = trained(options, method, way, seed, console)
                updates = steps * recipe.epochs
                content["runs"][f"{method}, {way}, seed {seed}"] = {
                    "method": method, "way": way, "seed": seed, **accuracies(options, run, console),
                    "seconds": round(updates * content["step_seconds"][method][way], 1),
                    "passes": round(passes_of(method_of(method, way), recipe) * recipe.epochs / 3, 1),
                    "logged_seconds": run.log[-1]["seconds"], "run": run.id,
                    "collapses": [each for row in run.log for each in row.get("collapses", [])],
                }  # fmt: skip
                content |= {"model": model, "images": options.n, "subset": whole.subset, "environment": environment()}
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(content, indent=1) + "\n")
                figure(content["runs"]).savefig(file.with_suffix(".png"), dpi=150)
                console.print(f"{method}, {way}, seed {seed}: {content['runs'][f'{method}, {way}, seed {seed}']}")


def figure(runs: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Plot clean accuracy and that under AutoAttack against time and against passes, a colour for each way."""
    methods = list(dict.fromkeys(run["method"] for run in runs.values()))
    with mpl.rc_context(STYLE):
        drawn = Figure(figsize=(10, 3.6 * len(methods)), layout="constrained")
        grid = drawn.subplots(len(methods), 2, squeeze=False)
        for method, row in zip(methods, grid, strict=True):
            for axes, cost, label in zip(
                row, ("seconds", "passes"), ("time of the training steps, s", "passes, epochs of natural training"),
                strict=True,
            ):  # fmt: skip
                for number, way in enumerate(WAYS):
                    its = [run for run in runs.values() if (run["method"], run["way"]) == (method, way)]
                    color, name = f"C{number}", way
                    for run in its:
                        axes.plot(run[cost], run["autoattack"], "o", color=color, label=name)
                        axes.plot(run[cost], run["clean"], "^", color=color, markerfacecolor="none")
                        name = "_"
                axes.set(xlabel=label, ylabel="accuracy, %", title=method, xlim=(0, None), ylim=(0, None))
        grid[0][1].legend(frameon=False, fontsize=7, title="● AutoAttack  △ clean")
    return drawn


if __name__ == "__main__":
    with one_thread():
        main(tyro.cli(Options))
