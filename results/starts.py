"""The table of robust training from an accurate model's weights beside training from the seed's."""

from __future__ import annotations

from pathlib import Path

from advalign.attacks.names import parse_name
from advalign.report.rows import Row
from advalign.report.tables import Table
from advalign.runs import Record, read_records

_STARTS = {"seed": "the seed's weights", "init": "the accurate model"}


def starts(folder: Path) -> Table:
    """Tabulate clean and robust accuracy over seeds, a row for each method, number of epochs and start."""
    records = {start: read_records(folder / start / "records.jsonl") for start in ("accurate", *_STARTS)}
    attacks = sorted(dict.fromkeys(each.attack for each in records["seed"]), key=lambda name: name != "clean")
    worst = next(name for name in attacks if parse_name(name).is_worst_case)
    rows = [("natural", "", str(records["accurate"][0].epochs), *_cells(records["accurate"], attacks))]
    settings = sorted({(record.method, record.epochs) for record in records["seed"]})
    for method, epochs in settings:
        for start, shown in _STARTS.items():
            of_row = [each for each in records[start] if (each.method, each.epochs) == (method, epochs)]
            rows.append((method, shown, str(epochs), *_cells(of_row, attacks)))
    first = records["seed"][0]
    seeds = ", ".join(map(str, sorted({record.seed for record in records["seed"]})))
    caption = (
        f"Accuracy in %, mean ± standard deviation over the seeds {seeds}; data: {first.data}; model: {first.model}; "
        f"threat: {first.threat}; training images: {first.training_images}; test images: {first.n}; checkpoint: "
        f"{first.checkpoint}; worst case: {worst}."
    )
    columns = ("method", "starts from", "epochs", *("worst case" if name == worst else name for name in attacks))
    return Table(columns, tuple(rows), frozenset(), caption)


def _cells(records: list[Record], attacks: list[str]) -> list[str]:
    row = Row(records[0].method, (), tuple(records))
    return [row.cell(attack) for attack in attacks]
