"""Measure training that knows the mix beside training first and mixing afterwards, on digits and tiny CIFAR-10.

`python results/mixaware.py WORK --data-dir DIR` trains below the folder WORK, makes the frontier of each robust network
with the natural one, and keeps its `frontier.json` in `results/mixaware/`. A second call goes on where the first
stopped. Without `--data-dir`, digits alone.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import advalign as aa
from advalign.evaluation.options import TargetOptions
from advalign.frontier.frontier import frontier
from advalign.training.recipes import RECIPES, Recipe, digits

OUT = Path(__file__).parent / "mixaware"
METHODS = ("trades", "mixaware(weight=0.9)", "mixaware")
CURVE = "worst(apgd-ce(steps=30), apgd-t(steps=30, targets=3))"


def measure(kept: Path, method: str, data: str, recipe: Recipe, work: Path, options: TargetOptions) -> None:
    """Train a method and its accurate network, and keep the frontier of the two."""
    if (kept / "frontier.json").exists():
        return
    train = {"data": data, "model": "small-cnn(width=16)", "runs": work / "runs", "data_dir": options.data_dir}
    natural = aa.train("natural", **train, recipe=recipe, device="cpu")
    guests = {"vanilla": natural.path} if method.startswith("mixaware") else {}
    robust = aa.train(method, **train, recipe=recipe, guests=guests, device="cpu")
    folder = work / kept.name
    traced = frontier(
        robust.path, natural.path, points=8, give=2.0, attacks=[], curve_attack=CURVE, held_out=500, out=folder,
        runs=work / "mixes", target_options=options,
    )  # fmt: skip
    kept.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "frontier.json", kept / "frontier.json")
    print(kept.name, [(point.count, str(point.setting)) for point in traced.test.points], flush=True)


def main(work: Path, data_dir: Path | None) -> None:
    """Measure digits with three seeds, then CIFAR-10 with one, in the setting of Table 1 (tiny)."""
    on_digits = TargetOptions(device="cpu", norm="linf", eps=digits().eps)
    for seed in range(3):
        for method in METHODS:
            recipe = replace(digits(), seed=seed)
            measure(OUT / f"digits-{method}-{seed}", method, "digits", recipe, work, on_digits)
    if data_dir is None:
        return
    tiny = replace(RECIPES["cpu"](), epochs=12, steps=5, validate_every=3)
    for method in METHODS:
        options = TargetOptions(device="cpu", n=1000, data_dir=data_dir, norm="linf", eps=tiny.eps)
        measure(OUT / f"cifar10-{method}-0", method, "cifar10", tiny, work, options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[3]) if "--data-dir" in sys.argv else None)
