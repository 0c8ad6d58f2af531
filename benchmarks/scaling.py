"""How a step's time grows: `python -m benchmarks.scaling`, some minutes on two CPU cores.

One factor at a time around TRADES on resnet18(width=16), batch 64, PGD-10: batch, width, attack steps, and each
plug-in. All variants of a factor are timed in turn. Prints a table, with the passes of each, and writes
results/benchmarks/scaling-<device>.json.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from advalign import models
from advalign.objectives import PLUGINS, Objective, parse
from advalign.runtime.device import pick_device, to_device
from advalign.runtime.environment import environment
from advalign.runtime.seeds import seeded
from advalign.training.step import Step
from benchmarks.timing import Way, in_turn, passes, rounds_ratio
from benchmarks.workloads import RECIPE

WIDTH, SIZE, STEPS, METHOD = 16, 64, 10, "trades"
FACTORS: dict[str, tuple[dict[str, Any], ...]] = {
    "batch": tuple({"size": size} for size in (16, 32, 64, 128)),
    "width": tuple({"width": width} for width in (8, 16, 32)),
    "attack steps": tuple({"steps": steps} for steps in (1, 2, 5, 10, 20)),
    "plug-in": ({}, *({"method": f"{METHOD}+{name}"} for name in PLUGINS)),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time training steps of growing size."""

    rounds: int = 3
    """rounds that count, each variant once in each"""
    device: str = "auto"
    """auto, cpu, cuda"""
    out: Path = Path("results/benchmarks")
    """folder of the results"""


def step_of(
    device: torch.device, *, method: str = METHOD, width: int = WIDTH, size: int = SIZE, steps: int = STEPS
) -> Way:
    """Return a whole training step on a fixed batch."""
    bound = parse(method)
    with seeded("scaling", width):
        student, *others = (models.build(f"resnet18(width={width})", classes=10) for _ in range(5))
        x, y = torch.rand(size, 3, 32, 32), torch.arange(size) % 10
    guests: dict[str, nn.Module] = dict(zip(("vanilla", "robust", "guide", "extractor"), others, strict=True))
    objective = to_device(Objective(bound, student, guests), device).train()
    step = Step(objective, replace(RECIPE, steps=steps), 1, device)
    x, y = x.to(device).contiguous(memory_format=torch.channels_last), y.to(device)
    objective.start_epoch([(x, y)], progress=0.0)
    second = x.flip(3).repeat(bound.further, 1, 1, 1) if bound.second else None

    def once() -> None:
        step.schedule(0)
        step.update(x, step.perturb(x, y, second), y, second)

    return once


def main(options: Options) -> None:
    """Measure, print, and write."""
    device, console, rows = pick_device(options.device), Console(), []
    for factor, variants in FACTORS.items():
        labels = [", ".join(str(value) for value in each.values()) or METHOD for each in variants]
        ways = {label: step_of(device, **each) for label, each in zip(labels, variants, strict=True)}
        seconds = in_turn(ways, options.rounds, device)
        for label, each in zip(labels, variants, strict=True):
            width = min(WIDTH, each.get("width", WIDTH))  # a network whose convolutions are all plain ones
            narrow: dict[str, Any] = each | {"width": width}
            work = passes(step_of(device, **narrow), _forward(device, width, each.get("size", SIZE)))
            growth = statistics.median(rounds_ratio(seconds[label], seconds[labels[0]]))
            entry = {"factor": factor, "value": label, "seconds": round(statistics.median(seconds[label]), 4)}
            entry |= {"times_the_first": round(growth, 2)}
            rows.append(entry | {"forward": work["forward"], "backward": work["backward"]})
    table = Table("factor", "value", "seconds", "times the first", "forward", "backward")
    for entry in rows:
        table.add_row(*(str(value) for value in entry.values()))
    console.print(table)
    file = options.out / f"scaling-{device.type}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    base = {"method": METHOD, "width": WIDTH, "batch": SIZE, "attack steps": STEPS}
    content = {"rounds": options.rounds, "around": base, "environment": environment(), "rows": rows}
    file.write_text(json.dumps(content, indent=1) + "\n")
    console.print(f"Written: {file}")


def _forward(device: torch.device, width: int, size: int) -> Way:
    net = models.build(f"resnet18(width={width})", classes=10).to(device)
    return partial(net, torch.rand(size, 3, 32, 32, device=device))


if __name__ == "__main__":
    main(tyro.cli(Options))
