"""Runs on disk: folders, checkpoints, records; every file is written atomically."""

from advalign.runs.records import Record, append_records, read_records
from advalign.runs.run import CHECKPOINTS, Run, load, weights_of

__all__ = ["CHECKPOINTS", "Record", "Run", "append_records", "load", "read_records", "weights_of"]
