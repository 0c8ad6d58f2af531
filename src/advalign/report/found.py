"""What lies below the paths of a report: records, run folders, and the results in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from advalign.errors import UserError, require
from advalign.runs import Record, Run, read_records
from advalign.runs.files import read_json


class Scope(NamedTuple):
    """Where accuracies can be compared."""

    data: str
    images: str
    """Digest of the data set."""
    threat: str
    n: int


class Evaluated(NamedTuple):
    """A result file of `advalign evaluate`, and what it holds."""

    file: Path
    content: dict[str, Any]

    @property
    def scope(self) -> Scope:
        """Where it was measured."""
        first = self.content["records"][0]
        return Scope(*(first[key] for key in Scope._fields))

    @property
    def records(self) -> list[Record]:
        """What it measured."""
        return [Record(**record) for record in self.content["records"]]

    @property
    def examples(self) -> Path:
        """The adversarial images, if they were saved."""
        return self.file.with_suffix(".npz")


@dataclass(frozen=True)
class Found:
    """What lies below the paths."""

    records: list[Record]
    runs: dict[str, Run]
    """By id."""
    evaluations: dict[str, list[Evaluated]]
    """By run."""
    diagnoses: dict[str, dict[str, Any]]
    """By run, what its newest diagnosis holds."""
    names: dict[str, str]
    """By run, its method, with seed or id where it was trained more than once."""

    def scopes(self) -> dict[Scope, list[Record]]:
        """Return the records of each scope."""
        scopes: dict[Scope, list[Record]] = {}
        for record in self.records:
            scopes.setdefault(Scope(*(getattr(record, key) for key in Scope._fields)), []).append(record)
        return scopes


def find(paths: Sequence[Path]) -> Found:
    """Read everything below the paths; what is found twice counts once.

    Raises:
        UserError: a path does not exist, there are no records below the paths, or a file is damaged.
    """
    require(bool(paths), "name at least one run folder, folder of runs, or file of records")
    files: list[Path] = []
    for path in paths:
        require(path.exists(), f"no such file or folder: {str(path)!r}")
        files += [path] if path.is_file() else sorted(path.rglob("records.jsonl"))
    records = list(dict.fromkeys(record for file in files for record in read_records(file)))
    require(bool(records), f"no records below {', '.join(map(str, paths))}: evaluate a run first")
    folders = [card.parent for path in paths for card in sorted(path.rglob("run.json"))]
    runs = {run.id: run for run in map(Run.read, folders)}
    evaluations = {run.id: _evaluations(run.path) for run in runs.values()}
    diagnoses = {
        run.id: read_json(max(files, key=lambda file: file.stat().st_mtime))
        for run in runs.values()
        if (files := list((run.path / "diagnosis").glob("*.json")))
    }
    return Found(records, runs, evaluations, diagnoses, _names(runs))


def _evaluations(folder: Path) -> list[Evaluated]:
    found = []
    for file in sorted((folder / "evaluations").glob("*.json")):
        if file.name.endswith(".robustbench.json"):
            continue
        content = read_json(file)
        if not (isinstance(content, dict) and content.get("records") and content.get("outcomes")):
            raise UserError(f"{file} is no result of advalign evaluate")
        found.append(Evaluated(file, content))
    return found


def _names(runs: dict[str, Run]) -> dict[str, str]:
    methods = {run: each.setting["method"] for run, each in runs.items()}
    seeds = {run: f"{methods[run]}, seed {each.setting['recipe']['seed']}" for run, each in runs.items()}
    ids = {run: f"{methods[run]}, {run}" for run in runs}
    return {
        run: next(names[run] for names in (methods, seeds, ids) if list(names.values()).count(names[run]) == 1)
        for run in runs
    }
