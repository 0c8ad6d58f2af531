"""Measure robust training from an accurate model's weights beside training from the seed's, on digits.

`python results/robust_from_accurate.py RUNS` trains below the folder RUNS, and writes `records.jsonl` of the accurate
model and of both starts into `results/robust-from-accurate/`. A second call goes on where the first stopped.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import advalign as aa
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.runs import Run, append_records
from advalign.training.recipes import digits

OUT = Path(__file__).parent / "robust-from-accurate"
MODEL = "small-cnn(width=8)"
EPS = 0.1
EPOCHS = (3, 10)
METHODS = ("at", "at+vfd", "trades", "trades+vfd")
ATTACKS = ("pgd(steps=20)", 'pgd(steps=20, restarts=2, loss="margin")')


def record(start: str, run: Run) -> None:
    """Measure a run's best checkpoint on the 500 test images, and keep the records with those of its start."""
    measured = measure(run.path, ATTACKS, TargetOptions(eps=EPS, norm="linf", device="cpu"))
    append_records(OUT / start / "records.jsonl", measured.records)
    print(start, run.path.name, measured.evaluation, flush=True)


def main(runs: Path) -> None:
    """Train and measure every method with three seeds."""
    for seed in range(3):
        recipe = replace(digits(), eps=EPS, seed=seed)
        accurate = aa.train("natural", data="digits", model=MODEL, recipe=recipe, runs=runs, device="cpu")
        record("accurate", accurate)
        for method in METHODS:
            guests = {"vanilla": accurate.path} if "vfd" in method else {}
            for epochs in EPOCHS:
                for start, init in (("seed", None), ("init", accurate.path)):
                    run = aa.train(
                        method, data="digits", model=MODEL, recipe=replace(recipe, epochs=epochs), runs=runs,
                        guests=guests, init=init, device="cpu",
                    )  # fmt: skip
                    record(start, run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
