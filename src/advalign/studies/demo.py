"""The demo: five models on scikit-learn's digits and a dial between two of them, without a download."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from advalign import attacks
from advalign.attacks.names import worst_case_name
from advalign.errors import TrainingError
from advalign.evaluation.options import TargetOptions
from advalign.frontier.frontier import frontier
from advalign.frontier.result import FILE, StoredFrontier, read_frontier
from advalign.report.frontier import frontier_figure
from advalign.report.gallery import GalleryRows, gallery, gallery_in_words
from advalign.report.page import FigureSection
from advalign.report.tables import print_table
from advalign.report.trade_off import trade_off_figure
from advalign.report.training import Logs, calibration_section, training_section
from advalign.runs import load
from advalign.runtime.files import write_atomically
from advalign.runtime.progress import say
from advalign.runtime.seeds import seeded
from advalign.studies.cells import CLEAN, Cell, Column
from advalign.studies.job import Job, dataset
from advalign.studies.progress import Progress
from advalign.studies.run import run_study
from advalign.studies.scales import SCALES, Scale
from advalign.studies.study import FigureBuilder, Study
from advalign.training.recipes import digits

DEMO_METHODS = (
    "natural",
    "at",
    "trades",
    "trades+vfd(weight=0.02)",
    "trades+vfd(weight=0.1)",
)
MODEL = "small-cnn(width=16)"
DEMO_ATTACKS = ("fgsm", "pgd(steps=20)", 'pgd(loss="margin", steps=20, restarts=2)')
_ROBUST, _ACCURATE = "trades+vfd", "natural"
_ON_FRONTIER = "apgd-t(steps=10, targets=2)"
_ON_DIAL = 200
"""Test images on which the dial is traced."""
_IN_GALLERY = ("natural", "trades+vfd(weight=0.1)")
_GALLERY_COLUMNS = 8


def demo(out: str | Path, *, seed: int = 0, time_budget: float | None = None, console: Console) -> bool:
    """Run the demo's study in a folder; return whether it is finished. The next call resumes it.

    Raises:
        UserError: the folder holds something else.
        TrainingError: a model could not be trained or measured.
    """
    out, study = Path(out), replace(demo_study(SCALES["tiny"], console), first_seed=seed)
    results = run_study(study, runs=out / "runs", out=out, device="cpu", time_budget=time_budget, console=console)
    if results.failures:
        raise TrainingError(f"the demo failed: {next(iter(results.failures.values()))}")
    if not results.progress.finished:
        return False
    for picture in (out / "report-files").glob("*.png"):  # beside the page, for readers who look for them there
        write_atomically(out / picture.name, picture.read_bytes())
    print_table(console, results.table())
    say(console, f"Report: {out / 'report.html'}  plot: {out / 'trade-off.png'}  numbers: {out / 'records.jsonl'}")
    return True


def demo_study(scale: Scale, console: Console | None = None) -> Study:
    """The demo: natural training, AT, TRADES and VFD on scikit-learn's digits; the same at every scale."""
    recipe = replace(digits(), epochs=10, steps=5)  # so that it all takes less than two minutes
    console = console or Console(quiet=True)
    return Study(
        name="demo",
        title="advalign demo: keep the accuracy",
        cells=tuple(Cell(method=method, data="digits", model=MODEL, recipe=recipe) for method in DEMO_METHODS),
        columns=demo_columns(),
        one_thread=True,  # the images are so small that a second thread gains little, and waits on a busy machine
        introduction=(
            f"{len(DEMO_METHODS)} models of one architecture, {MODEL}, on scikit-learn's handwritten digits, each "
            f"trained for {recipe.epochs} epochs and attacked in {recipe.threat}. The checkpoint is the best by PGD-10 "
            f"on {recipe.validation} held-out training images.",
            "Read the plot as a curve: the weight of VFD moves TRADES between clean and robust accuracy. "
            "One seed on a small data set: half a point is 2 or 3 images.",
            f"The other curve is a dial after training: {_ROBUST} mixed with {_ACCURATE} at several weights, on "
            f"{_ON_DIAL} of the test images; each is attacked, and shown what was made on all others.",
        ),
        figures=tuple(
            map(_once_finished, (partial(_trade_off, console), _frontier, _examples, _training, _calibration))
        ),
    )


def demo_columns() -> tuple[Column, ...]:
    """Return clean accuracy, the demo's attacks, and the worst case over them."""
    attacked = (Column(heading=attack, attack=attack) for attack in DEMO_ATTACKS)
    return (Column(heading=CLEAN), *attacked, Column(heading="worst case", attack=worst_case_name(DEMO_ATTACKS)))


def _once_finished(draw: FigureBuilder) -> FigureBuilder:
    """Draw only at the end: after each cell, drawing would take longer than the cell."""
    return lambda progress: draw(progress) if progress.finished else None


def _trade_off(console: Console, progress: Progress) -> FigureSection:
    stored = _mixed(progress, console)
    caption = "Clean against worst-case accuracy on the test set; up and to the right is better."
    return FigureSection("Trade-off", trade_off_figure(progress.records(), frontiers=[stored]), caption)


def _mixed(progress: Progress, console: Console) -> StoredFrontier:
    """Return the frontier between a robust and the accurate network, made now unless it is there."""
    runs = {job.cell.method: job.run.path for job in progress.jobs_of_first_seed}
    folder = runs[_ROBUST].parent / "frontier"
    if not (folder / FILE).exists():
        say(console, f"frontier: {_ROBUST} mixed with {_ACCURATE}, half the time that the models took")
        frontier(
            runs[_ROBUST], runs[_ACCURATE], points=4, give=5.0, attacks=(), curve_attack=_ON_FRONTIER, out=folder,
            target_options=TargetOptions(n=_ON_DIAL, device="cpu"),
        )  # fmt: skip
    return read_frontier(folder / FILE)


def _frontier(progress: Progress) -> FigureSection:
    stored = _mixed(progress, Console(quiet=True))
    caption = (
        f"{_ROBUST} mixed with {_ACCURATE}, no training. Dashed: the floor, below which no accurate network could push "
        f"the mix. The star was chosen on {stored.content['images_held_out']}: {stored.content['rule']}."
    )
    return FigureSection("After training", frontier_figure(stored), caption)


def _examples(progress: Progress) -> FigureSection:
    rows = _gallery_rows([job for job in progress.jobs_of_first_seed if job.cell.row in _IN_GALLERY])
    caption = (
        "PGD-20 from the same images for each model: original, adversarial example, and their difference amplified "
        "around grey. Below each: the true class and the predicted one."
    )
    figure = gallery(rows, amplify=0.5 / progress.jobs[0].threat.eps)
    return FigureSection("Adversarial examples", figure, caption, gallery_in_words(rows))


def _gallery_rows(jobs: list[Job]) -> GalleryRows:
    """Attack the first test image of each of the first classes."""
    data = dataset("digits", None)
    firsts = torch.stack([(data.test.labels == label).nonzero()[0, 0] for label in range(_GALLERY_COLUMNS)])
    x, y = data.test.floats(firsts), data.test.labels[firsts]
    rows = {}
    for job in jobs:
        model = load(job.run.path)
        with seeded("gallery"):
            x_adv = attacks.PGD(job.threat, steps=20, until_fooled=False)(model, x, y)
        with torch.no_grad():
            predicted = model(x_adv).argmax(1)
        captions = [
            f"true {data.class_names[label]}\npredicted {data.class_names[other]}"
            for label, other in zip(y, predicted, strict=True)
        ]
        rows[job.cell.method] = (x, x_adv, captions)
    return rows


def _logs(progress: Progress) -> Logs:
    return {job.cell.method: job.run.log for job in progress.jobs_of_first_seed}


def _training(progress: Progress) -> FigureSection:
    return training_section(_logs(progress))


def _calibration(progress: Progress) -> FigureSection | None:
    return calibration_section(_logs(progress))
