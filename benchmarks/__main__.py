"""The benchmark suite: `python -m benchmarks [--data-dir DIR]`, about a quarter of an hour on two CPU cores.

Training steps of five methods beside the plain loops (`plain.py`), an epoch of natural training from uint8 images on,
and PGD-20 and C&W on a half-robust model, timed in turn in one process; and how long commands take to start. The ways
of a training step must make the same update in float64 before they are timed; one that does not is left out, told,
and the command ends with 1. Prints a table and writes results/benchmarks/<device>.json (<device>.partial.json until
all is measured). On a GPU the sizes are the papers', start-up and memory alone are left out, and images a second,
seconds an epoch of 50,000 images and the share of the arithmetic floor are added; the replayed graphs must do in
float64 what plain steps do. FLOPs are those of plain convolutions. `--autoattack` adds what `autoattack.py` counts.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import DEVNULL, run
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from advalign.runtime.cuda_graphs import WARM_UPS
from advalign.runtime.device import pick_device
from advalign.runtime.environment import environment
from benchmarks.timing import in_turn, passes, peak_flops, peak_memory, row
from benchmarks.workloads import TRAINING, differences, evaluations, memory_of, natural_epoch, training_step

HERE = Path(__file__).parent
FLOPS = {64: 1.1108e9, 32: 0.2786e9, 16: 0.0701e9}  # of one image through resnet18; tests/models checks them
# Workload, width and batch; the headline at all widths.
ON_CPU = (
    ("natural", 16, 128), ("at", 16, 128), ("trades", 16, 128), ("trades+lbgat", 16, 128),
    ("trades+vfd", 16, 128), ("trades+vfd", 32, 64), ("trades+vfd", 64, 32),
)  # fmt: skip
ON_GPU = tuple((workload, 64, size) for size in (128, 512) for workload in TRAINING)
EPOCH = 50_000
ROUNDING = 1e-6  # the most by which the ways' updates may differ in float64
CHECKED = {"once, best": "once", "ours, bf16": "ours", "ours, bf16, graphs": "ours, graphs"}  # in whose float64


@dataclass(frozen=True, kw_only=True)
class Options:
    """Time training steps and evaluations beside plain loops."""

    rounds: int = 5
    """rounds that count, each way once in each"""
    steps: int | None = None
    """training steps a round and way; 1, and 40 on a GPU, if not given"""
    only: tuple[str, ...] = ()
    """workloads; all if not given"""
    data_dir: Path | None = None
    """where CIFAR-10 lies; the evaluations are left out, and said to be, where it is not given"""
    images: int = 2000
    """test images of PGD-20; C&W takes a quarter as many"""
    autoattack: bool = False
    """also count AutoAttack's passes beside the reference's code: half an hour more, into autoattack.json"""
    device: str = "auto"
    """auto, cpu, cuda"""
    out: Path = Path("results/benchmarks")
    """folder of the results"""


def main(options: Options) -> None:
    """Measure, print, and write."""
    device, console = pick_device(options.device), Console()
    on_gpu = device.type == "cuda"
    options = replace(options, steps=options.steps or (40 if on_gpu else 1))
    ways = ("authors", "once", "once, best", "ours", "ours, bf16", *(("ours, bf16, graphs",) if on_gpu else ()))
    load, peak, rows = os.getloadavg()[0], peak_flops(device), []
    file = options.out / f"{'gpu' if on_gpu else 'cpu'}.json"
    partial_file = file.with_suffix(".partial.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "rounds": options.rounds,
        "steps": options.steps,
        "load_before": load,
        "peak_gflops": round(peak / 1e9, 1),
        "environment": environment(),
        "startup": {} if on_gpu else _startup(options.rounds),
        "rows": rows,
    }
    if result["startup"]:
        console.print(f"Start-up: {result['startup']} s", highlight=False)

    def add(entry: dict[str, Any]) -> None:
        rows.append(entry)
        console.print(_line(entry), highlight=False)
        partial_file.write_text(json.dumps(result, indent=1) + "\n")

    for workload, width, size in ON_GPU if on_gpu else ON_CPU:
        if not options.only or workload in options.only:
            add(_training(workload, width, size, ways, device, options, peak))
    if not on_gpu and (not options.only or "memory" in options.only):  # a GPU has this batch in its rows
        add(_memory("trades+vfd", 64, 128))
    if not options.only or "natural epoch" in options.only:
        add(_epoch(*((64, 128, EPOCH) if on_gpu else (16, 128, 2048)), ways[3:], device, options))
    wanted = not options.only or {"PGD-20", "C&W-100"} & set(options.only)
    if options.data_dir is not None and wanted:
        for name, (all_ways, n) in evaluations(
            "cifar10", options.data_dir, HERE / ".cache", options.images, device
        ).items():
            found = {way: attack() for way, attack in all_ways.items()}
            measured = row(in_turn(all_ways, options.rounds, device))
            withstand = {way: round(float(flags.float().mean()), 4) for way, flags in found.items()}
            differing = {way: int((found["plain"].cpu() != flags.cpu()).sum()) for way, flags in found.items()}
            add({"workload": name, "images": n, **measured, "withstand": withstand, "differing": differing})
    elif wanted:
        console.print("PGD-20 and C&W are left out: they need --data-dir, where CIFAR-10 lies")
    console.print(_table(rows))
    if rows:
        partial_file.replace(file)
        console.print(f"Written: {file}")
    if options.autoattack:
        from benchmarks import autoattack  # needs the reference's package, of the extra dev

        autoattack.main(options.data_dir)
    if any(entry.get("left_out") for entry in rows):
        sys.exit(1)


def _startup(rounds: int) -> dict[str, float]:
    """Return the median seconds that new processes take, in turn."""
    commands = {
        "import torch": ["-c", "import torch"],
        "advalign --help": ["-m", "advalign", "--help"],
        "advalign list": ["-m", "advalign", "list", "methods"],
    }
    ways = {
        name: partial(run, [sys.executable, *words], check=True, stdout=DEVNULL) for name, words in commands.items()
    }
    seconds = in_turn(ways, rounds, torch.device("cpu"))
    return {name: round(statistics.median(times), 2) for name, times in seconds.items()}


def _training(
    workload: str, width: int, size: int, ways: tuple[str, ...], device: torch.device, options: Options, peak: float
) -> dict[str, Any]:
    exact = ("once", "ours") if workload == "natural" else ("authors", "once", "ours")
    on_gpu = device.type == "cuda"
    difference = differences(workload, exact, width, str(device) if on_gpu else "cpu")
    if on_gpu:
        replayed = differences(workload, ("ours", "ours, graphs"), width, str(device), WARM_UPS + 2)
        difference |= {"ours, graphs": replayed["ours, graphs"]}
    wrong = [way for way, apart in difference.items() if not apart <= ROUNDING]
    ways = tuple(way for way in ways if (way != "authors" or way in exact) and CHECKED.get(way, way) not in wrong)
    steps = {way: training_step(workload, way, width, size, str(device))[0] for way in ways}

    def several(way: str) -> None:
        for _ in range(many):
            steps[way]()

    many = options.steps or 1
    if on_gpu:  # beyond what a recording needs
        for way in ways:
            for _ in range(WARM_UPS + 1):
                steps[way]()
    found = in_turn({way: lambda way=way: several(way) for way in ways}, options.rounds, device)
    measured = row({way: [took / many for took in times] for way, times in found.items()})
    steps.clear()  # or its networks would be in the next numbers
    seconds, work = measured["seconds"], {way: _passes(workload, way) for way in exact}
    flops = {way: sum(each.values()) * FLOPS[width] * size for way, each in work.items()}
    entry: dict[str, Any] = {
        "workload": workload,
        "model": f"resnet18(width={width})",
        "batch": size,
        **measured,
        "float64_difference": difference,
        "left_out": wrong,
        "forward": {way: work[way]["forward"] for way in exact},
        "backward": {way: work[way]["backward"] for way in exact},
        "gflops": {way: round(flops[_counted(way)] / seconds[way] / 1e9, 1) for way in ways},
        "share_of_peak": {way: round(flops[_counted(way)] / seconds[way] / peak, 3) for way in ways},
        "memory_mib": {way: peak_memory(memory_of, (workload, way, width, size, str(device)), device) for way in ways},
    }
    if on_gpu:
        entry["images_a_second"] = {way: round(size / value) for way, value in seconds.items()}
        entry["seconds_an_epoch"] = {way: round(EPOCH / size * value, 2) for way, value in seconds.items()}
        entry["share_of_floor"] = {
            way: round(flops["ours"] * EPOCH / size / peak / entry["seconds_an_epoch"][way], 3) for way in ways
        }
    return entry


def _passes(workload: str, way: str) -> dict[str, float]:
    """Return a step's passes, counted on a small network, whose convolutions are all plain ones."""
    step, student = training_step(workload, way, 16, 16)
    return passes(step, partial(student, torch.rand(16, 3, 32, 32)))


def _counted(way: str) -> str:
    """Return the way that does the same passes, in the precision in which they are counted."""
    return way.partition(",")[0]


def _memory(workload: str, width: int, size: int) -> dict[str, Any]:
    ways, cpu = ("authors", "once", "once, best", "ours", "ours, bf16"), torch.device("cpu")
    memory = {way: peak_memory(memory_of, (workload, way, width, size, "cpu"), cpu) for way in ways}
    shape = {"model": f"resnet18(width={width})", "batch": size}
    return {"workload": f"{workload}, memory alone", **shape, "seconds": {}, "ratio": {}, "memory_mib": memory}


def _epoch(
    width: int, size: int, images: int, ways: tuple[str, ...], device: torch.device, options: Options
) -> dict[str, Any]:
    runs = {way: natural_epoch(way, width, size, images, str(device)) for way in ("plain", "plain, workers", *ways)}
    measured = row(in_turn(runs, options.rounds, device))
    return {
        "workload": "natural epoch", "model": f"resnet18(width={width})", "batch": size, "images": images, **measured
    }  # fmt: skip


def _label(entry: dict[str, Any]) -> str:
    if "batch" in entry:
        return f"{entry['workload']}, {entry['model']}, batch {entry['batch']}"
    return f"{entry['workload']}, {entry['images']} images"


def _line(entry: dict[str, Any]) -> str:
    if not entry["seconds"]:
        return f"{_label(entry)}: {entry['memory_mib']} MiB"
    ratios = "; ".join(
        f"{way} is faster than " + ", ".join(f"{other} {value:.2f}x" for other, value in each.items())
        for way, each in entry["ratio"].items()
    )
    wrong = "".join(f"; LEFT OUT, its update is another: {way}" for way in entry.get("left_out", ()))
    return f"{_label(entry)}: {entry['seconds']} s; {ratios}{wrong}"


def _table(rows: list[dict[str, Any]]) -> Table:
    plain = ("authors", "once", "once, best", "plain", "plain, workers")
    table = Table("workload", "way", "seconds", *plain, "forward", "backward", "share of peak", "MiB")
    for entry in rows:
        ways = entry["seconds"] or dict.fromkeys(entry["memory_mib"], "")
        for way, seconds in ways.items():
            faster = [str(entry["ratio"].get(way, {}).get(other, "")) for other in plain]
            names = ("forward", "backward", "share_of_peak", "memory_mib")
            cells = [str(entry.get(name, {}).get(way, "")) for name in names]
            label = _label(entry) if way == next(iter(ways)) else ""
            table.add_row(label, way, str(seconds), *faster, *cells)
    return table


if __name__ == "__main__":
    main(tyro.cli(Options))
