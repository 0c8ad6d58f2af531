"""The report on any set of runs: their accuracies, their trade-off, their training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from advalign.errors import require
from advalign.report.figures import calibration_curves, trade_off, training_curves
from advalign.report.page import Plate, write_page
from advalign.report.tables import Table, accuracy_table, worst_cases
from advalign.runs import Run, read_records
from advalign.runtime import environment

CALIBRATION = (
    "Distance of the student's features to the vanilla model's, and VFD's gradient at those features beside that of "
    "what teaches labels, on the first batch of each epoch."
)


def report_on(paths: Sequence[str | Path], out: str | Path) -> Table:
    """Write one HTML page on the runs and records below the paths, and return its table.

    Args:
        paths: run folders, folders of runs, or files of records (`.jsonl`); what is found twice counts once.

    Raises:
        UserError: a path does not exist, or there are no records below the paths.
    """
    require(bool(paths), "name at least one run folder, folder of runs, or file of records")
    files: list[Path] = []
    for path in map(Path, paths):
        require(path.exists(), f"no such file or folder: {str(path)!r}")
        files += [path] if path.is_file() else sorted(path.rglob("records.jsonl"))
    records = list(dict.fromkeys(record for file in files for record in read_records(file)))
    require(bool(records), f"no records below {', '.join(map(str, paths))}: evaluate a run first")
    cards = [card for path in map(Path, paths) for card in sorted(path.rglob("run.json"))]
    runs = list({run.id: run for run in (Run.read(card.parent) for card in cards) if run.log}.values())
    table = accuracy_table(records)
    plates: list[Plate] = []
    if worst_cases(records):
        plates.append(Plate("Trade-off", trade_off(records), "Up and to the right is better."))
    if runs:
        logs = _labelled(runs)
        curves = training_curves(logs)
        plates.append(Plate("Training", curves, "Loss on the training images, accuracy on held-out ones."))
        if calibrated := {name: log for name, log in logs.items() if "vfd" in log[0].get("calibration", {})}:
            plates.append(Plate("Calibration of VFD", calibration_curves(calibrated), CALIBRATION))
    introduction = [f"{len(runs)} runs, {len(records)} records."]
    write_page(Path(out), "advalign report", introduction, table, plates, environment())
    return table


def _labelled(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs' logs by method, and by id where a method was trained more than once."""
    methods = [run.setting["method"] for run in runs]
    return {
        method if methods.count(method) == 1 else f"{method}, {run.id}": run.log
        for run, method in zip(runs, methods, strict=True)
    }
