"""Winograd's convolution beside the plain one: `python -m benchmarks.convolutions`, a minute on two CPU cores.

An attack's way through one wide layer: forward, and the gradient to the input. The plain one in both memory formats;
ours with its weights transformed, and apart from that the transform, which each step of training needs once. Timed in
turn, with the distance of each from float64, relative in norm. Prints a table and writes
results/benchmarks/convolutions.json.
"""

from __future__ import annotations

import copy
import json
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from advalign.models.winograd import Winograd
from advalign.runtime.device import to_device
from advalign.runtime.environment import environment
from advalign.runtime.seeds import seeded
from benchmarks.timing import in_turn, row

LAYERS = (  # channels, side of the map, images: those of ResNet-18 at widths 32 and 64, and of wide residual networks
    *((256, 4, 32), (256, 4, 64), (512, 4, 32), (512, 4, 128), (256, 8, 32), (256, 8, 128)),
    *((256, 16, 32), (320, 16, 32), (640, 8, 16), (640, 8, 64)),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time wide convolutions in both ways."""

    rounds: int = 15
    """rounds that count, each way once in each"""
    out: Path = Path("results/benchmarks")
    """folder of the results"""


def main(options: Options) -> None:
    """Measure, print, and write."""
    console, rows = Console(), [_measured(*layer, options.rounds) for layer in LAYERS]
    table = Table("channels", "side", "images", "plain, s", "ours, s", "times faster", "transform, s")
    for entry in rows:
        plain, seconds = entry["faster_plain"], entry["seconds"]
        found = (seconds[plain], seconds["ours"], entry["ratio"]["ours"][plain], entry["transform_seconds"])
        table.add_row(*(str(value) for value in (entry["channels"], entry["side"], entry["images"], *found)))
    console.print(table)
    file = options.out / "convolutions.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"rounds": options.rounds, "environment": environment(), "rows": rows}, indent=1) + "\n")
    console.print(f"Written: {file}")


def _measured(channels: int, side: int, images: int, rounds: int) -> dict[str, Any]:
    with seeded("convolution", channels, side):
        conv = nn.Conv2d(channels, channels, 3, padding=1).requires_grad_(False)
        x, grad = torch.randn(images, channels, side, side).relu(), torch.randn(images, channels, side, side)
    exact = _both(copy.deepcopy(conv).double(), x.double(), grad.double())
    fast = Winograd.adopt(copy.deepcopy(conv))
    assert fast is not None
    x_last, grad_last = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad))
    ways = {
        "plain, NCHW": partial(_both, copy.deepcopy(conv), x, grad),
        "plain, channels_last": partial(_both, to_device(conv, torch.device("cpu")), x_last, grad_last),
        "ours": partial(_both, fast, x_last, grad_last),
    }
    apart = {way: [_apart(a, b) for a, b in zip(both(), exact, strict=True)] for way, both in ways.items()}
    cpu = torch.device("cpu")
    transform = in_turn({"transform": fast._transform}, rounds, cpu)["transform"]
    measured = row(in_turn(ways, rounds, cpu))
    plain = min(measured["ratio"]["ours"], key=lambda way: measured["seconds"][way])
    return {
        "channels": channels, "side": side, "images": images, **measured, "faster_plain": plain,
        "transform_seconds": round(statistics.median(transform), 5), "forward_and_gradient_error": apart,
    }  # fmt: skip


def _both(conv: nn.Module, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    out = conv(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def _apart(a: Tensor, b: Tensor) -> float:
    return float(f"{float((a - b).norm() / b.norm()):.1e}")


if __name__ == "__main__":
    main(tyro.cli(Options))
