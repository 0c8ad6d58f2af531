"""A record is one measured number with everything needed to repeat it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

from advalign.errors import UserError
from advalign.runs.files import read_lines, write_lines


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One accuracy, as a share in [0, 1], with its provenance."""

    method: str
    data: str
    model: str
    checkpoint: str  # best, last, or a file's name
    attack: str  # clean, an attack's spelling, or worst case
    threat: str
    accuracy: float
    n: int  # test images
    training_images: int
    epochs: int
    seed: int
    run: str  # the run's id, which digests method, recipe, data, model and guests
    seconds: float
    commit: str
    torch: str
    device: str


def append_records(path: Path, records: list[Record]) -> None:
    """Add records to a JSON Lines file; one measured anew takes the place of the old."""
    old = [record for record in read_records(path) if _key(record) not in {_key(new) for new in records}]
    write_lines(path, [asdict(record) for record in (*old, *records)])


def read_records(path: Path) -> list[Record]:
    """Read the records of a JSON Lines file; a missing file has none.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    names = {field.name for field in fields(Record)}
    rows = read_lines(path)
    for row in rows:
        if row.keys() != names:
            raise UserError(f"{path} holds no records: expected the fields {', '.join(sorted(names))}")
    return [Record(**row) for row in rows]


def _key(record: Record) -> tuple[object, ...]:
    return (record.run, record.checkpoint, record.attack, record.threat, record.n)
