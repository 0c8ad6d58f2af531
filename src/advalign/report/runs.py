"""The report on any set of runs: their accuracies, their trade-off, their training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from advalign.errors import require
from advalign.report.figures import trade_off, training_curves
from advalign.report.page import Plate, write_page
from advalign.report.tables import Table, accuracy_table
from advalign.runs import Record, Run, read_records
from advalign.runtime import environment


def report_on(paths: Sequence[str | Path], out: str | Path) -> Table:
    """Write one HTML page on the runs and records below the paths, and return its table.

    Args:
        paths: run folders, folders of runs, or files of records (`.jsonl`).

    Raises:
        UserError: a path does not exist, or there are no records below the paths.
    """
    require(bool(paths), "name at least one run folder, folder of runs, or file of records")
    records: list[Record] = []
    runs: list[Run] = []
    for path in map(Path, paths):
        require(path.exists(), f"no such file or folder: {str(path)!r}")
        if path.is_file():
            records += read_records(path)
        else:
            found = [Run.read(card.parent) for card in sorted(path.rglob("run.json"))]
            loose = [file for file in sorted(path.rglob("records.jsonl")) if not (file.parent / "run.json").exists()]
            runs += found
            records += [record for run in found for record in run.records]
            records += [record for file in loose for record in read_records(file)]
    require(bool(records), f"no records below {', '.join(map(str, paths))}: evaluate a run first")
    table = accuracy_table(records)
    plates = []
    if any(record.attack == "worst case" for record in records):
        plates.append(Plate("Trade-off", trade_off(records), "Up and to the right is better."))
    if logs := {f"{run.setting['method']}, seed {run.setting['recipe']['seed']}": run.log for run in runs if run.log}:
        plates.append(
            Plate("Training", training_curves(logs), "Loss on the training images, accuracy on held-out ones.")
        )
    write_page(
        Path(out), "advalign report", [f"{len(runs)} runs, {len(records)} records."], table, plates, environment()
    )
    return table
