"""The demo: scikit-learn's digits, no network, two minutes; the trade-off between accuracy and robustness as curves."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.console import Console

from advalign import attacks
from advalign.data import Dataset, load
from advalign.evaluation.measure import measure
from advalign.report.figures import (
    GalleryRows,
    calibration_curves,
    gallery,
    gallery_in_words,
    png,
    trade_off,
    training_curves,
)
from advalign.report.page import FigureSection, write_page
from advalign.report.report import CALIBRATION
from advalign.report.tables import accuracy_table, print_table
from advalign.runs import Record, Run
from advalign.runs import load as load_model
from advalign.runtime.device import one_thread
from advalign.runtime.environment import environment
from advalign.runtime.files import write_atomically, write_lines
from advalign.runtime.progress import say
from advalign.runtime.seeds import seeded
from advalign.threats import Linf
from advalign.training.recipes import digits
from advalign.training.train import train

METHODS = (
    "natural",
    "at",
    "trades(beta=1)",
    "trades",
    "trades+vfd(weight=0.02)",
    "trades+vfd(weight=0.1)",
)
MODEL = "small-cnn(width=16)"
ATTACKS = ("fgsm", "pgd(steps=20)", 'pgd(loss="margin", steps=20, restarts=2)')
SHOWN = ("natural", "trades", "trades+vfd(weight=0.1)")


def demo(out: str | Path, *, seed: int = 0, time_budget: float | None = None, console: Console) -> bool:
    """Train, attack and report; return whether it came to its end. A second call takes what is finished as it is.

    Raises:
        UserError: the folder holds something else.
    """
    with one_thread():  # the images are so small that a second thread gains little, and waits much on a busy machine
        return _demo(Path(out), seed, time_budget, console)


def _demo(out: Path, seed: int, time_budget: float | None, console: Console) -> bool:
    recipe, data = replace(digits(), seed=seed), load("digits")
    runs: list[Run] = []
    deadline = None if time_budget is None else time.monotonic() + time_budget
    for method in METHODS:
        left = None if deadline is None else deadline - time.monotonic()
        run = train(
            method,
            data=data,
            model=MODEL,
            recipe=recipe,
            runs=out / "runs",
            device="cpu",
            time_budget=left,
            console=console,
        )
        if not run.finished:
            return False
        runs.append(run)
    threat = Linf(recipe.eps)
    records: list[Record] = []
    for run in runs:
        records += measure(run.path, ATTACKS, data=data, eps=recipe.eps, device="cpu", console=console).records
    table = accuracy_table(records)
    write_lines(out / "records.jsonl", [asdict(record) for record in records])
    introduction = (
        f"Six models of one architecture ({MODEL}) on scikit-learn's handwritten digits, trained for {recipe.epochs} "
        f"epochs each with seed {seed}, attacked inside {threat} on {len(data.test)} test images. The checkpoint is "
        f"the best by PGD-10 on {recipe.validation} held-out training images.",
        "Read the plot as curves: beta (TRADES) and weight (VFD) are dials between clean and robust accuracy. "
        "One seed on a small data set: half a point is 2 or 3 images.",
    )
    bands = _attacked({run.setting["method"]: run for run in runs if run.setting["method"] in SHOWN}, data, threat)
    plates = (
        FigureSection(
            "Trade-off",
            trade_off(records),
            "Clean against worst-case accuracy on the test set; up and to the right is better.",
        ),
        FigureSection(
            "Adversarial examples",
            gallery(bands, amplify=0.5 / threat.eps),
            "PGD-20 from the same images for each model: original, adversarial example, and their difference amplified "
            "around grey. Below each: the true class and what the model takes it for.",
            gallery_in_words(bands),
        ),
        FigureSection(
            "Training",
            training_curves({str(run.setting["method"]): run.log for run in runs}),
            "Training loss, and accuracy on the held-out training images.",
        ),
        FigureSection(
            "Calibration of VFD",
            calibration_curves(
                {str(run.setting["method"]): run.log for run in runs if "vfd" in run.log[0].get("calibration", {})}
            ),
            CALIBRATION,
        ),
    )
    for plate in plates:
        write_atomically(out / f"{plate.heading.lower().replace(' ', '-')}.png", png(plate.figure))
    write_page(out / "report.html", "advalign demo: keep the accuracy", introduction, table, plates, environment())
    print_table(console, table)
    say(console, f"Report: {out / 'report.html'}  plot: {out / 'trade-off.png'}  numbers: {out / 'records.jsonl'}")
    return True


def _attacked(runs: dict[str, Run], data: Dataset, threat: Linf, count: int = 8) -> GalleryRows:
    """Attack the first test image of each of `count` classes."""
    rows = torch.stack([(data.test.labels == label).nonzero()[0, 0] for label in range(count)])
    x, y = data.test.floats(rows), data.test.labels[rows]
    bands = {}
    attack = attacks.PGD(threat, steps=20, until_fooled=False)
    for method, run in runs.items():
        model = load_model(run.path)
        with seeded("gallery"):
            x_adv = attack(model, x, y)
        with torch.no_grad():
            says = model(x_adv).argmax(1)
        pairs = zip(y, says, strict=True)
        captions = [f"true {data.class_names[a]}\npredicted {data.class_names[b]}" for a, b in pairs]
        bands[method] = (x, x_adv, captions)
    return bands
