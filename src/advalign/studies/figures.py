"""The figures of studies: the trade-off and sweeps along curves, and maps of features."""

from __future__ import annotations

from advalign.report.features import feature_caption, feature_map, feature_maps, first_of_each_class
from advalign.report.page import FigureSection
from advalign.report.sweeps import sweep_curves, trade_off_curves
from advalign.runs import find_weights
from advalign.runtime.device import pick_device
from advalign.studies.job import dataset
from advalign.studies.progress import Progress
from advalign.studies.study import FigureBuilder

ROBUST = "PGD"
"""The heading of the column that is robust accuracy in figures: of all test images, at every scale."""


def trade_off_section(progress: Progress) -> FigureSection | None:
    """Draw clean against robust accuracy along the study's curves."""
    if not (curves := progress.curves(ROBUST)):
        return None
    caption = "Up and to the right is better. Bars: one standard deviation over seeds, where there are several."
    if aside := ", ".join(cell.row for cell in progress.cells if not cell.curve):
        caption += f" Not drawn: {aside}."
    return FigureSection("Trade-off", trade_off_curves(curves, ROBUST), caption)


def sweep_section(along: str) -> FigureBuilder:
    """Return the builder of a figure of clean and robust accuracy along the argument `along`."""

    def draw(progress: Progress) -> FigureSection | None:
        if not (curves := progress.curves(ROBUST)):
            return None
        caption = f"Accuracy along {along}. Bars: one standard deviation over seeds, where there are several."
        return FigureSection(f"Along {along}", sweep_curves(curves, along, ROBUST), caption)

    return draw


def feature_section(progress: Progress) -> FigureSection | None:
    """Draw the features of every trained model of the first seed, of five classes of test images."""
    jobs = [job for job in progress.jobs_of_first_seed if job.run.finished]
    if not jobs:
        return None
    first, device = jobs[0], pick_device(progress.context.device)
    data = dataset(first.cell.data, progress.context.data_dir)
    images, class_names = first_of_each_class(data.test, 5, 500), data.class_names[:5]
    maps = {}
    for job in jobs:
        if (job.cell.data, job.threat) == (first.cell.data, first.threat):
            weights = find_weights(job.run.path, model=job.cell.model)
            cache_file = progress.out / "features" / f"{job.run.id}.npz"
            maps[job.cell.row] = feature_map(weights, images, first.threat, device, cache_file)
    return FigureSection(
        "Features", feature_maps(maps, class_names), feature_caption(images, first.threat, class_names)
    )
