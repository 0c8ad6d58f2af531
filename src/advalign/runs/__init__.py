"""Runs on disk: folders, checkpoints, records; every file is written atomically."""

from advalign.runs.records import Record, append_records, latest, read_records
from advalign.runs.run import Run, load, require_classes, weights_of

__all__ = ["Record", "Run", "append_records", "latest", "load", "read_records", "require_classes", "weights_of"]
