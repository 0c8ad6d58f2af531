"""Where AutoAttack's time goes, beside the reference's code: `python -m benchmarks.autoattack_time --data-dir DIR`.

Each of the four attacks of the standard runs at its full length, ours and the reference's in turn, on the same images
of CIFAR-10 that all withstand (the radius is a fortieth of a grey level), so that both make every pass. The networks
are trained for a moment, since their arithmetic does not depend on their weights. Seconds are those of the processor,
on one thread. With each attack stand the operators that take most of our time, of a shorter run. Needs the package
`pyautoattack` (extra `dev`); about 20 minutes. Writes results/benchmarks/autoattack-time.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import profile

from advalign import models
from advalign.attacks.ensemble import AutoAttack
from advalign.attacks.pass_counter import PassCounter
from advalign.data import Batches, Dataset, load
from advalign.runtime.device import one_thread
from advalign.runtime.environment import environment
from advalign.runtime.seeds import seeded
from advalign.threats import Linf

BUDGET = Linf(0.025 / 255)
OUT = Path(__file__).parent.parent / "results" / "benchmarks" / "autoattack-time.json"
MODELS = ("small-cnn", "resnet18(width=16)")
OPERATORS = 5
PROFILED: dict[str, dict[str, int]] = {
    "apgd-ce": {"steps": 10}, "apgd-t": {"steps": 10, "targets": 1}, "fab-t": {"steps": 5, "targets": 1},
    "square": {"queries": 500},
}  # fmt: skip


def briefly_trained(model: str, data: Dataset, steps: int = 20) -> nn.Module:
    """Return a network in eval mode whose BatchNorms have seen images."""
    with seeded("briefly trained"):
        net = models.build(model, classes=data.classes).train()
        optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
        batches = Batches(data.train, 64, augment="none", seed=0).epoch(0)
        for _, (x, y) in zip(range(steps), batches, strict=False):
            cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    return net.eval().requires_grad_(False)


def theirs(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    """Return the reference's four attacks as its standard makes them."""
    given: dict[str, Any] = {"norm": "Linf", "eps": BUDGET.eps, "seed": 0, "n_restarts": 1}
    attacks = (
        APGDAttack(net, n_iter=100, loss="ce", **given),
        APGDAttack_targeted(net, n_iter=100, n_target_classes=9, **given),
        FABAttack_PT(net, n_iter=100, n_target_classes=9, targeted=True, **given),
        SquareAttack(net, n_queries=5000, resc_schedule=False, **given),
    )
    names = ("apgd-ce", "apgd-t", "fab-t", "square")
    return {name: partial(attack.perturb, x, y) for name, attack in zip(names, attacks, strict=True)}


def seconds(way: Callable[[], Any]) -> float:
    """Return the processor's seconds of a call."""
    began = time.process_time()
    way()
    return round(time.process_time() - began, 2)


def main(
    data_dir: Annotated[Path | None, tyro.conf.arg(help="where CIFAR-10 lies")] = None,
    architectures: Annotated[tuple[str, ...], tyro.conf.arg(help="their networks")] = MODELS,
    images: Annotated[int, tyro.conf.arg(help="test images")] = 16,
    out: Annotated[Path, tyro.conf.arg(help="the file to write")] = OUT,
) -> None:
    """Time all four attacks by each code on each network, and print and write the table."""
    rows: dict[str, dict[str, Any]] = {}
    with one_thread():
        data = load("cifar10", directory=data_dir)
        x = data.test.floats()[:images]
        for model in architectures:
            net = briefly_trained(model, data)
            y, counter = net(x).argmax(1), PassCounter(net)
            reference, rows[model] = theirs(net, x, y), {}
            for (name, their_way), attack in zip(reference.items(), AutoAttack(BUDGET).members, strict=True):
                counter.counts = [0, 0]
                took = {"reference": seconds(their_way), "advalign": seconds(partial(attack, counter, x, y))}
                rows[model][name] = {
                    **took,
                    "ratio": round(took["reference"] / took["advalign"], 2),
                    "passes of an image": [round(count / images) for count in counter.counts],
                    "operators": operators(partial(replace(attack, **PROFILED[name]), counter, x, y)),
                }
                print(model, name, json.dumps(rows[model][name]), flush=True)
            total = {way: sum(row[way] for row in rows[model].values()) for way in ("reference", "advalign")}
            rows[model]["autoattack"] = {**total, "ratio": round(total["reference"] / total["advalign"], 2)}
            print(model, "autoattack", json.dumps(rows[model]["autoattack"]), flush=True)
    content = {"images": images, "rows": rows, "environment": environment()}
    out.write_text(json.dumps(content, indent=1) + "\n")


def operators(way: Callable[[], Any]) -> dict[str, float]:
    """Return the shares of time of the operators that take most of it."""
    with profile() as profiled:
        way()
    averages = profiled.key_averages()
    whole = sum(event.self_cpu_time_total for event in averages)
    longest = sorted(averages, key=lambda event: event.self_cpu_time_total, reverse=True)[:OPERATORS]
    return {event.key: round(event.self_cpu_time_total / whole, 3) for event in longest}


if __name__ == "__main__":
    tyro.cli(main)
