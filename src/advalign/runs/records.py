"""A record is one measured number with everything needed to repeat it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from advalign.errors import require
from advalign.runs.formats import RecordRow, read_checked_lines, write_checked_lines
from advalign.runtime.files import require_writable
from advalign.runtime.locks import locked

EVALUATE_AGAIN = "remove it, and evaluate again"


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One accuracy, as a share in [0, 1], with its provenance."""

    method: str
    data: str
    images: str  # digest of the data set
    model: str
    checkpoint: str  # best, last, or a file's name
    attack: str  # clean, an attack's spelling, or worst(...) of several
    threat: str
    accuracy: float
    n: int  # test images
    precision: str  # of the attack; the verdict is fp32
    attack_seed: int
    batch_size: int  # of the evaluation; random starts depend on it
    training_images: int
    epochs: int
    recipe: str  # digest of the whole recipe but its seed
    seed: int
    run: str  # the run's id, which digests method, recipe, data, model and guests
    seconds: float
    commit: str
    torch: str
    device: str


_OUTCOME = ("accuracy", "seconds", "commit", "torch", "device")


def append_records(path: Path, records: list[Record]) -> None:
    """Add records to a JSON Lines file; what was measured before in just the same way gives way to the new.

    Of two processes that add at a time, one waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(_lock_file(path)):
        write_checked_lines(path, [asdict(record) for record in latest([*read_records(path), *records])])


def require_appendable(path: Path) -> None:
    """Refuse a file to which records cannot be added, before the work that they are the result of.

    Raises:
        UserError: it cannot be read, its folder not be written to, or its lock not be taken.
    """
    read_records(path)
    require_writable(path.parent)
    lock = _lock_file(path)
    usable = not lock.exists() or (lock.is_file() and os.access(lock, os.R_OK | os.W_OK))
    require(usable, lambda: f"cannot lock {lock}: remove it, or make it writable")


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def latest(records: Iterable[Record]) -> list[Record]:
    """Return, of records that were measured in just the same way, the last; in their order."""
    last: dict[tuple[object, ...], Record] = {}
    for record in records:
        last.pop(_measured(record), None)
        last[_measured(record)] = record
    return list(last.values())


def read_records(path: Path) -> list[Record]:
    """Read the records of a JSON Lines file; a missing file has none.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    return [Record(**row) for row in read_checked_lines(path, RecordRow, EVALUATE_AGAIN)]


def _measured(record: Record) -> tuple[object, ...]:
    return tuple(value for name, value in asdict(record).items() if name not in _OUTCOME)
