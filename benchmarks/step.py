"""One TRADES+VFD training step, PGD-10, against the loops it replaces: `python benchmarks/step.py`.

Three ways run in turn in one process, on equal weights and images: the authors' (eager, NCHW, clean logits recomputed
with their graph at each attack step, three forwards for the loss: 23 student forwards), the clean-logits-once way
(13 forwards, as MAIR does), and ours. Before any timing, the three must make the same update in float64. Medians of the
per-round ratios are printed and written to results/benchmarks/step.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import advalign as aa
from advalign.runtime import environment, place

SIZES = ((16, 128), (32, 64), (64, 32))  # width of resnet18, images a batch
EPS, STEP, STEPS, BETA, WEIGHT = 8 / 255, 2 / 255, 10, 6.0, 0.02
Step = Callable[[Tensor, Tensor], None]


def attack(student: nn.Module, x: Tensor, *, recompute: bool) -> Tensor:
    """TRADES' inner maximisation as its authors write it; `recompute` runs the clean images at each step."""
    student.eval()
    with torch.no_grad():
        clean = student(x).softmax(1)
    x_adv = x + 0.001 * torch.randn_like(x)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        target = student(x).softmax(1) if recompute else clean
        loss = F.kl_div(student(x_adv).log_softmax(1), target, reduction="sum")
        (grad,) = torch.autograd.grad(loss, [x_adv])
        x_adv = x_adv.detach() + STEP * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
    student.train()
    return x_adv


def plain(student: nn.Module, vanilla: nn.Module, *, recompute: bool) -> Step:
    """A whole step in plain PyTorch; `recompute` is the authors' way."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _: object, output: Tensor) -> None:
        seen[module] = output

    for net in (student, vanilla):
        net.get_submodule("layer4").register_forward_hook(keep)
    layer, vanilla_layer = student.get_submodule("layer4"), vanilla.get_submodule("layer4")

    def features(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = net(x)
        return logits, seen[layer if net is student else vanilla_layer].flatten(1)

    def step(x: Tensor, y: Tensor) -> None:
        x_adv = attack(student, x, recompute=recompute)
        with torch.no_grad():
            _, target = features(vanilla, x)
        clean, clean_features = features(student, x)
        adv, adv_features = features(student, x_adv)
        towards = student(x) if recompute else clean
        kl = F.kl_div(adv.log_softmax(1), towards.softmax(1), reduction="batchmean")
        vfd = (clean_features - target).norm(dim=1).mean() + (adv_features - target).norm(dim=1).mean()
        optimizer.zero_grad()
        (F.cross_entropy(clean, y) + BETA * kl + WEIGHT * vfd).backward()
        optimizer.step()

    return step


def ours(student: nn.Module, vanilla: nn.Module) -> Step:
    """The same step through the library."""
    method = aa.TRADES(beta=BETA) + aa.VFD(weight=WEIGHT)
    objective = place(aa.compose(method, student=student, vanilla=vanilla), torch.device("cpu")).train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=True)
    threat = aa.Linf(EPS)

    def step(x: Tensor, y: Tensor) -> None:
        x_adv = objective.perturb(x, y, threat, steps=STEPS, step_size=STEP)
        aa.total(objective(x, x_adv, y)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ways(width: int, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Step, nn.Module]]:
    """Return each way's step and the student that it trains, all from equal weights."""
    torch.manual_seed(0)
    student, vanilla = (aa.models.build(f"resnet18(width={width})", classes=10).to(dtype) for _ in range(2))
    made = {}
    for name in ("authors", "once", "ours"):
        mine, frozen = copy.deepcopy(student).train(), copy.deepcopy(vanilla).eval()
        made[name] = (ours(mine, frozen) if name == "ours" else plain(mine, frozen, recompute=name == "authors"), mine)
    return made


def check() -> float:
    """Return the largest relative difference of the ways' updates in float64, which must be rounding."""
    x, y = torch.rand(16, 3, 32, 32, dtype=torch.float64), torch.arange(16) % 10
    updates = []
    for step, student in ways(4, torch.float64).values():
        before = _flat(student)
        torch.manual_seed(1)
        step(x, y)
        updates.append(_flat(student) - before)
    worst = max(float((update - updates[0]).norm() / updates[0].norm()) for update in updates)
    assert worst < 1e-6, f"the ways differ by {worst}"
    return worst


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def main() -> None:
    """Measure, print a table, and write the results."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--out", type=Path, default=Path("results/benchmarks/step.json"))
    given = options.parse_args()
    difference = check()
    rows = []
    for width, size in SIZES:
        x, y = torch.rand(size, 3, 32, 32), torch.arange(size) % 10
        made = ways(width)
        images = dict.fromkeys(made, x) | {"ours": x.contiguous(memory_format=torch.channels_last)}  # as batches are
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for round_ in range(given.rounds + 1):
            for name in list(made) if round_ % 2 else reversed(list(made)):
                began = time.perf_counter()
                made[name][0](images[name], y)
                seconds[name].append(time.perf_counter() - began)
        counted = {name: times[1:] for name, times in seconds.items()}  # the first round warms up
        ratios = {
            name: [other / mine for other, mine in zip(counted[name], counted["ours"], strict=True)]
            for name in ("authors", "once")
        }
        row = {
            "model": f"resnet18(width={width})",
            "batch": size,
            "seconds": {name: statistics.median(times) for name, times in counted.items()},
            "ratio": {name: statistics.median(values) for name, values in ratios.items()},
            "ratio_range": {name: [min(values), max(values)] for name, values in ratios.items()},
        }
        rows.append(row)
        print(
            f"{row['model']:<20} batch {size:>3}  authors {row['seconds']['authors']:.2f} s  "
            f"once {row['seconds']['once']:.2f} s  ours {row['seconds']['ours']:.2f} s  "
            f"authors/ours {row['ratio']['authors']:.2f}  once/ours {row['ratio']['once']:.2f}",
            flush=True,
        )
    result = {
        "command": f"python benchmarks/step.py --rounds {given.rounds}",
        "rounds": given.rounds,
        "load": os.getloadavg()[0],
        "machine": platform.machine(),
        "float64_difference": difference,
        "environment": environment(),
        "rows": rows,
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
