"""What lies below the paths of a report: records, run folders, and results, also of weights from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from advalign.errors import UserError, require
from advalign.runs import Record, Run, latest, read_records
from advalign.runtime.files import digest_of_file, read_json

# How a result of `advalign evaluate` begins. Other JSON below the paths is somebody else's, and is not read.
_RESULT = re.compile(rb'\s*\{\s*"records":\s*\[\s*\{\s*"method"')
_FIELDS = {field.name for field in fields(Record)}


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
    content: Mapping[str, Any]

    @property
    def first(self) -> Mapping[str, Any]:
        """The first of its records; the others differ in attack, accuracy and time alone."""
        return self.content["records"][0]

    @property
    def scope(self) -> Scope:
        """Where it was measured."""
        return Scope(*(self.first[key] for key in Scope._fields))

    @property
    def records(self) -> list[Record]:
        """What it measured."""
        return [Record(**record) for record in self.content["records"]]

    @property
    def weights(self) -> Path | None:
        """The weights file from elsewhere that was measured, if it still lies where its results were put beside it."""
        file = self.file.parent.parent / self.first["checkpoint"]
        return file if file.is_file() and digest_of_file(file) == self.content.get("weights") else None

    @property
    def examples(self) -> Path:
        """The adversarial images, if they were saved."""
        return self.file.with_suffix(".npz")


@dataclass(frozen=True)
class Found:
    """What lies below the paths.

    A model is known by its run's id. Weights from elsewhere, of which nobody knows how they were trained, are known by
    their file's name with `, evaluated only` behind it, which is also the method of their records.
    """

    records: list[Record]
    runs: dict[str, Run]
    """By id."""
    evaluations: dict[str, list[Evaluated]]
    """By model."""
    diagnoses: dict[str, dict[str, Any]]
    """By run, what its newest diagnosis holds."""
    names: dict[str, str]
    """By model: of a run its method, with seed or id where it was trained more than once."""

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
    require(bool(paths), "name at least one run folder, folder of runs, or file of records or results")
    for path in paths:
        require(path.exists(), lambda: f"no such file or folder: {str(path)!r}")
    folders = [card.parent for path in paths for card in sorted(path.rglob("run.json"))]
    runs = {run.id: run for run in map(Run.read, folders)}
    evaluations = {run.id: _evaluations(run.path) for run in runs.values()}
    read = {each.file.resolve() for results in evaluations.values() for each in results}
    others = _by_model(_evaluated(file) for file in _results(paths) if file.resolve() not in read)
    # What a run's folder holds comes last, and so counts where the same was measured again.
    records = latest([*(r for results in others.values() for each in results for r in each.records), *_written(paths)])
    records.sort(key=lambda record: not record.run)  # in tables, what is known of comes first
    require(bool(records), lambda: f"no records below {', '.join(map(str, paths))}: evaluate a run first")
    names = _names(runs)
    for model, results in others.items():
        evaluations.setdefault(model, []).extend(results)
        first = results[0].first
        names.setdefault(model, f"{first['method']}, {model}" if first["run"] else model)
    diagnoses = {
        run.id: read_json(max(files, key=lambda file: file.stat().st_mtime))
        for run in runs.values()
        if (files := list((run.path / "diagnosis").glob("*.json")))
    }
    return Found(records, runs, evaluations, diagnoses, names)


def _written(paths: Sequence[Path]) -> Iterator[Record]:
    """Read the files of records."""
    for path in paths:
        for file in sorted(path.rglob("records.jsonl")) if path.is_dir() else [path]:
            if file.suffix != ".json":
                for record in read_records(file):
                    yield record if record.run else replace(record, method=_evaluated_only(record.method))


def _results(paths: Sequence[Path]) -> list[Path]:
    """Return the results of `advalign evaluate`: those that are named, and those in folders."""
    named = [path for path in paths if path.is_file() and path.suffix == ".json"]
    below = [file for path in paths for file in sorted(path.rglob("*.json")) if _begins_as_result(file)]
    return list({file.resolve(): file for file in (*named, *below)}.values())


def _begins_as_result(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return _RESULT.match(opened.read(64)) is not None
    except OSError:  # a folder of that name, or what we may not read: none of ours
        return False


def _evaluations(folder: Path) -> list[Evaluated]:
    files = sorted((folder / "evaluations").glob("*.json"))
    return [_evaluated(file) for file in files if not file.name.endswith(".robustbench.json")]


def _evaluated(file: Path) -> Evaluated:
    content = read_json(file)
    whole = isinstance(content, dict) and content.get("records") and content.get("outcomes")
    if not (whole and all(isinstance(each, dict) and each.keys() == _FIELDS for each in content["records"])):
        raise UserError(f"{file} is no result of advalign evaluate")
    return Evaluated(file, content)


def _by_model(results: Iterable[Evaluated]) -> dict[str, list[Evaluated]]:
    """Return results by run or, of weights from elsewhere, by their file's name, which becomes their method.

    Other weights in a file of the same name, or the same under another normalisation, are another model.
    """
    models: dict[str, list[Evaluated]] = {}
    results = list(results)
    for each in results:
        method = each.first["method"]
        if each.first["run"]:
            models.setdefault(each.first["run"], []).append(each)
            continue
        weights, mean = each.content.get("weights", ""), each.content.get("mean")
        namesakes = [other.content for other in results if other.first["method"] == method and not other.first["run"]]
        if any(other.get("weights", "") != weights for other in namesakes):
            method += f" {weights[:8]}"
        if mean and any(other.get("weights") == weights and other.get("mean") != mean for other in namesakes):
            method += f" with mean {' '.join(map(str, mean))}"
        label = _evaluated_only(method)
        told = [{**record, "method": label} for record in each.content["records"]]
        models.setdefault(label, []).append(each._replace(content={**each.content, "records": told}))
    return models


def _evaluated_only(method: str) -> str:
    return f"{method}, evaluated only"


def _names(runs: dict[str, Run]) -> dict[str, str]:
    methods = {run: each.setting["method"] for run, each in runs.items()}
    seeds = {run: f"{methods[run]}, seed {each.setting['recipe']['seed']}" for run, each in runs.items()}
    ids = {run: f"{methods[run]}, {run}" for run in runs}
    return {
        run: next(names[run] for names in (methods, seeds, ids) if list(names.values()).count(names[run]) == 1)
        for run in runs
    }
