"""The sources of a report: records, run folders, and result files, also of weights without a training record."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from advalign.attacks.names import parse_name, transfer_name, worst_case_name
from advalign.errors import UserError, require
from advalign.frontier.result import FILE as FRONTIER_FILE
from advalign.frontier.result import StoredFrontier, read_frontier
from advalign.runs import Record, Run, latest, read_records
from advalign.runs.formats import DiagnosisFile, ResultFile, read_checked_json
from advalign.runtime.files import digest_of_file, require_original
from advalign.runtime.near import near_path
from advalign.spelling import parse_calls

# How a result file of `advalign evaluate` begins. Other JSON below the paths belongs to other programs and is not read.
_RESULT = re.compile(rb'\s*\{\s*"records":\s*\[\s*\{\s*"method"')
_NEEDED = ("recipe", "guests", "shape")  # of a setting, to say what the run is and how to repeat it

T = TypeVar("T")


class Scope(NamedTuple):
    """What accuracies must share to be comparable."""

    data: str
    images: str
    """Digest of the data set."""
    threat: str
    n: int


class StoredResult(NamedTuple):
    """A result file of `advalign evaluate`, and its content."""

    file: Path
    content: Mapping[str, Any]

    @property
    def first(self) -> Mapping[str, Any]:
        """The first record; the others differ only in attack, accuracy and time."""
        return self.content["records"][0]

    def with_data(self, places: Mapping[str, str]) -> StoredResult:
        """Return the result with its data where those of their digest are found."""
        records = [{**each, "data": places.get(each["images"], each["data"])} for each in self.content["records"]]
        return self._replace(content={**self.content, "records": records})

    @property
    def scope(self) -> Scope:
        """The scope of all its records."""
        return Scope(*(self.first[key] for key in Scope._fields))

    @property
    def records(self) -> list[Record]:
        """The measured accuracies."""
        return [Record(**record) for record in self.content["records"]]

    @property
    def weights(self) -> Path | None:
        """The measured weights file outside of any run, if it is still beside the folder of its results."""
        file = self.file.parent.parent / self.first["checkpoint"]
        return file if file.is_file() and digest_of_file(file) == self.content.get("weights") else None

    @property
    def by_frontier(self) -> bool:
        """Whether `advalign frontier` has measured it, by examples made on many networks."""
        return len({parse_name(attack).surrogate for attack in self.content["outcomes"]} - {""}) > 1

    @property
    def examples(self) -> Path:
        """The file of the adversarial images, which exists if they were saved."""
        return self.file.with_suffix(".npz")


@dataclass(frozen=True)
class ReportSources:
    """Everything below the paths of a report, by model.

    A run is known by its id. Weights without a training record are known by their file's name with `, evaluated only`
    behind it, which is also the method of their records.
    """

    records: list[Record]
    runs: dict[str, Run]
    """The runs by id."""
    results: dict[str, list[StoredResult]]
    """The result files of each model."""
    diagnoses: dict[str, dict[str, Any]]
    """The content of the newest diagnosis of each run."""
    names: dict[str, str]
    """The name of each model: of a run its method, with seed or id where several runs have the same method."""
    frontiers: list[StoredFrontier]
    unreadable: list[str]
    """A line on each file that could not be read, with the reason."""

    @property
    def trained(self) -> list[Record]:
        """The records of networks that were trained, and not made of others by a frontier."""
        return [each for each in self.records if each.run not in self.runs or not of_frontier(self.runs[each.run])]

    def scopes(self) -> dict[Scope, list[Record]]:
        """Return the records of each scope."""
        scopes: dict[Scope, list[Record]] = {}
        for record in self.records:
            scopes.setdefault(Scope(*(getattr(record, key) for key in Scope._fields)), []).append(record)
        return scopes

    def notes(self, scope: Scope) -> list[str]:
        """Return what the results of a scope say of their images, such as the classes that they have; each once."""
        every = (result for of_model in self.results.values() for result in of_model if result.scope == scope)
        return sorted({result.content.get("note", "") for result in every} - {""})


def find_sources(paths: Sequence[Path]) -> ReportSources:
    """Read everything below the paths that can be read; what is below two of them counts once.

    Raises:
        UserError: a path does not exist, or there are no records below the paths that can be read.
    """
    require(bool(paths), "name at least one run folder, folder of runs, or file of records or results")
    for path in paths:
        require(path.exists(), lambda: f"no such file or folder: {str(path)!r}{near_path(path)}")
    reader = _Reader()
    files = {file.resolve(): file for path in paths for file in (path, *sorted(path.rglob(FRONTIER_FILE)))}
    frontiers = [
        stored
        for file in files.values()
        if file.name == FRONTIER_FILE and (stored := reader.read(read_frontier, file)) is not None
    ]
    folders = [card.parent for path in paths for card in sorted(path.rglob("run.json"))]
    runs = {run.id: run for folder in folders if (run := reader.read(_read_run, folder)) is not None}
    results = {run.id: _results_of_run(run, reader) for run in runs.values()}
    read = {result.file.resolve() for of_run in results.values() for result in of_run}
    others = _by_model(
        result
        for file in _result_files(paths)
        if file.resolve() not in read and (result := reader.read(_read_result, file)) is not None
    )
    # Records in a run's folder come last, and so replace older ones of the same measurement.
    records = latest([*(r for of_model in others.values() for result in of_model for r in result.records),
                      *_records_below(paths, reader)])  # fmt: skip
    records = _without_sets_of_frontiers(records, runs)
    records.sort(key=lambda record: not record.run)  # runs come first in tables
    reasons = "".join(f"; {line}" for line in reader.unreadable[:1])
    require(bool(records), lambda: f"no records below {', '.join(map(str, paths))}: evaluate a run first{reasons}")
    names = _names_of_runs(runs)
    for model, of_model in others.items():
        results.setdefault(model, []).extend(of_model)
        first = of_model[0].first
        names.setdefault(model, f"{first['method']}, {model}" if first["run"] else model)
    diagnoses = {run.id: newest for run in runs.values() if (newest := _newest_diagnosis(run, reader)) is not None}
    places = _places_of_data(records)
    records = [replace(record, data=places.get(record.images, record.data)) for record in records]
    results = {model: [result.with_data(places) for result in of_model] for model, of_model in results.items()}
    return ReportSources(records, runs, results, diagnoses, names, frontiers, reader.unreadable)


def of_frontier(run: Run) -> bool:
    """Return whether a run is the chosen network of a frontier, which was not trained."""
    return "frontier" in run.setting


def _without_sets_of_frontiers(records: Sequence[Record], runs: Mapping[str, Run]) -> list[Record]:
    """Return records without the many sets of examples that a frontier shows its network; of their worst case a name.

    How much each set has taken is on the frontier's own page. A mix is named by its two networks alone.
    """
    shown, hidden = list(records), set[tuple[str, str]]()
    for i, each in enumerate(records):
        if each.run in runs and of_frontier(runs[each.run]):
            record = shown[i] = replace(each, model=" and ".join(_networks(each.model)))
            members = {member: parse_name(member).surrogate for member in parse_name(record.attack).members}
            if len({*members.values()} - {""}) > 1:
                own = [member for member, surrogate in members.items() if not surrogate]
                name = worst_case_name([*own, transfer_name("all examples", "its frontier")])
                shown[i] = replace(record, attack=name)
                hidden |= {(record.run, member) for member, surrogate in members.items() if surrogate}
    return [record for record in shown if (record.run, record.attack) not in hidden]


def _networks(model: str) -> list[str]:
    """Return the spellings of the networks in a mix; of another model its own."""
    if not model.startswith("mix("):
        return [model]
    (call,) = parse_calls(model)
    return [str(call.arguments[name]) for name in ("robust", "accurate")]


def _places_of_data(records: Iterable[Record]) -> dict[str, str]:
    """Return one place for the user's data of each digest, which may have been moved: one that is there, if any is."""
    names: dict[str, list[str]] = {}
    for record in records:
        if ":" in record.data:
            names.setdefault(record.images, []).append(record.data)
    return {
        images: max(of_data, key=lambda each: Path(each.partition(":")[2]).exists())
        for images, of_data in names.items()
    }


class _Reader:
    """Reads files one by one, and notes those that cannot be read instead of ending with the first."""

    def __init__(self) -> None:
        self.unreadable: list[str] = []

    def read(self, reader: Callable[[Path], T], path: Path) -> T | None:
        """Return what a function reads from a file, or None where it cannot."""
        try:
            return reader(path)
        except UserError as error:
            if (line := f"Not read: {error}.") not in self.unreadable:
                self.unreadable.append(line)
            return None


def _read_run(folder: Path) -> Run:
    run = Run.read(folder)
    lacking = [key for key in _NEEDED if key not in run.setting]
    require(not lacking, lambda: f"{folder / 'run.json'} does not say its {' and '.join(lacking)}")
    require("seed" in run.setting["recipe"], lambda: f"{folder / 'run.json'} does not say its seed")
    return run


def _newest_diagnosis(run: Run, reader: _Reader) -> dict[str, Any] | None:
    files = sorted((run.path / "diagnosis").glob("*.json"), key=lambda file: file.lstat().st_mtime, reverse=True)
    contents = (
        reader.read(lambda each: read_checked_json(each, DiagnosisFile, "diagnose again", run.id), file)
        for file in files
    )
    return next((content for content in contents if content is not None), None)


def _records_below(paths: Sequence[Path], reader: _Reader) -> Iterator[Record]:
    for path in paths:
        for file in sorted(path.rglob("records.jsonl")) if path.is_dir() else [path]:
            if file.suffix != ".json":
                for record in reader.read(_read_records, file) or ():
                    yield record if record.run else replace(record, method=_evaluated_only(record.method))


def _read_records(file: Path) -> list[Record]:
    """Read records; those in a run's folder must be that run's own, as far as it can be read."""
    try:
        run = Run.read(file.parent)
    except UserError:
        return read_records(file)
    return run.records


def _result_files(paths: Sequence[Path]) -> list[Path]:
    """Return the result files of `advalign evaluate`: those among the paths, and those in folders."""
    named = [path for path in paths if path.is_file() and path.suffix == ".json" and path.name != FRONTIER_FILE]
    below = [file for path in paths for file in sorted(path.rglob("*.json")) if _begins_as_result(file)]
    return list({file.resolve(): file for file in (*named, *below)}.values())


def _begins_as_result(file: Path) -> bool:
    try:
        if not file.is_file():  # a folder of that name, or a pipe, which would be waited for
            return False
        with file.open("rb") as content:
            return _RESULT.match(content.read(64)) is not None
    except OSError:  # without permission: not a result of ours
        return False


def _results_of_run(run: Run, reader: _Reader) -> list[StoredResult]:
    seen: dict[str, Path] = {}

    def read(file: Path) -> StoredResult:
        result = _read_result(file)
        other = result.first["run"]
        require(other == run.id, lambda: f"{file} belongs to run {other or 'of no record'}, not to {run.id}: remove it")
        require_original(file, seen, "remove both, and evaluate again")
        return result

    files = sorted((run.path / "evaluations").glob("*.json"))
    results = (reader.read(read, file) for file in files if not file.name.endswith(".robustbench.json"))
    return [result for result in results if result is not None]


def _read_result(file: Path) -> StoredResult:
    return StoredResult(file, read_checked_json(file, ResultFile, "evaluate again"))


def _by_model(results: Iterable[StoredResult]) -> dict[str, list[StoredResult]]:
    """Return results by run or, of weights without a training record, by their file's name, which is their method.

    Other weights in a file of the same name, or the same weights under another normalisation, are another model.
    """
    models: dict[str, list[StoredResult]] = {}
    results = list(results)
    for result in results:
        method = result.first["method"]
        if result.first["run"]:
            models.setdefault(result.first["run"], []).append(result)
            continue
        weights, mean = result.content.get("weights", ""), result.content.get("mean")
        namesakes = [other.content for other in results if other.first["method"] == method and not other.first["run"]]
        if any(other.get("weights", "") != weights for other in namesakes):
            method += f" {weights[:8]}"
        if mean and any(other.get("weights") == weights and other.get("mean") != mean for other in namesakes):
            method += f" with mean {' '.join(map(str, mean))}"
        label = _evaluated_only(method)
        records = [{**record, "method": label} for record in result.content["records"]]
        models.setdefault(label, []).append(result._replace(content={**result.content, "records": records}))
    return models


def _evaluated_only(method: str) -> str:
    return f"{method}, evaluated only"


def _names_of_runs(runs: dict[str, Run]) -> dict[str, str]:
    methods = {run: each.setting["method"] for run, each in runs.items()}
    seeds = {run: f"{methods[run]}, seed {each.setting['recipe']['seed']}" for run, each in runs.items()}
    ids = {run: f"{methods[run]}, {run}" for run in runs}
    return {
        run: next(names[run] for names in (methods, seeds, ids) if list(names.values()).count(names[run]) == 1)
        for run in runs
    }
