"""Runs on disk: folders, checkpoints, records; every file is written atomically."""

from advalign.runs.records import Record, append_records, latest, read_records
from advalign.runs.run import Run
from advalign.runs.sources import Weights, find_weights, load, require_classes

__all__ = [
    "Record",
    "Run",
    "Weights",
    "append_records",
    "find_weights",
    "latest",
    "load",
    "read_records",
    "require_classes",
]
