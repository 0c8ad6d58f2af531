"""The JSON files of the library: one schema for each, a format version, and a checksum; checked before believed.

A file of an earlier version without a checksum is believed, and a note says so. NaN and infinity are written as
Python's JSON does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from advalign.errors import UserError, require
from advalign.runtime.files import digest, present, read_content, write_atomically
from advalign.runtime.sealed import note_unsealed
from advalign.threats import Norm, parse_threat

JSON_FORMAT = 1
"""Raised when a newer program writes what this one cannot read."""

Kind = TypeVar("Kind", bound=msgspec.Struct)


class Setting(msgspec.Struct):
    """What names a run; other settings may be there as well."""

    method: str
    data: str
    model: str
    classes: int = 0
    shape: tuple[int, int, int] = (0, 0, 0)
    """of an image, (C, H, W)"""
    images: str = ""
    """digest of the data set"""
    recipe: dict[str, Any] = {}
    guests: dict[str, str] = {}
    extra: str = ""
    init: str = ""
    """the run's id, or the digest of the weights, that the student starts from"""
    own: dict[str, str] = {}
    class_names: list[str] = []
    """of data of the user's own, which are known by their content; earlier versions knew them by their path"""


class RunFile(msgspec.Struct, forbid_unknown_fields=True):
    """`run.json`."""

    id: str
    status: Literal["running", "finished", "diverged"]
    setting: Setting
    environment: dict[str, str]
    warning: str = ""
    """what makes the trained model doubtful"""
    class_names: list[str] = []
    preprocessing: dict[str, str] = {}
    """of the images, before they were stored"""


class LogRow(msgspec.Struct, forbid_unknown_fields=True):
    """A line of `log.jsonl`, one for each epoch."""

    epoch: int
    lr: float
    loss: float
    terms: dict[str, float]
    seconds: float = 0.0
    validation: dict[str, float] = {}
    calibration: dict[str, dict[str, dict[str, float]]] = {}
    compile_seconds: float = 0.0
    guard: list[float] = []
    """robust accuracies that the guard against catastrophic overfitting has seen in the epoch"""
    collapses: list[dict[str, float]] = []
    """what it has gone back to this epoch for"""
    skipped_steps: int = 0
    """steps whose gradients fp16 could not hold"""
    ranks: int = 1
    """processes that trained it together"""
    sync_norms: bool = False
    """whether BatchNorm saw the images of all of them"""


class RecordRow(msgspec.Struct, forbid_unknown_fields=True):
    """A line of `records.jsonl`, and a record of a result; see `Record`."""

    method: str
    data: str
    images: str
    model: str
    checkpoint: str
    attack: str
    threat: str
    accuracy: float
    n: int
    precision: str
    attack_seed: int
    batch_size: int
    training_images: int
    epochs: int
    recipe: str
    seed: int
    run: str
    seconds: float
    commit: str
    torch: str
    device: str

    def __post_init__(self) -> None:
        if not (0 <= self.accuracy <= 1 and self.n >= 1):  # NaN fails the comparison
            raise ValueError(f"accuracy {self.accuracy} on {self.n} images")
        parse_threat(self.threat)


class PassCounts(msgspec.Struct, forbid_unknown_fields=True):
    """Forward and backward passes of an attack, in images."""

    forward: int
    backward: int


class ResultFile(msgspec.Struct, forbid_unknown_fields=True):
    """A result of `advalign evaluate`: its records, and of each image whether it withstood."""

    records: list[RecordRow]
    outcomes: dict[str, str]
    """by name, a digit for each image: 1 if it is classified correctly"""
    environment: dict[str, str]
    weights: str = ""
    part: str = ""
    """which of several state dicts in the weights file"""
    mean: list[float] = []
    std: list[float] = []
    passes: dict[str, PassCounts] = {}
    trails: dict[str, dict[str, float]] = {}
    members: dict[str, dict[str, PassCounts]] = {}
    warnings: list[str] = []
    note: str = ""
    class_names: list[str] = []
    """the model's, in the order of its logits"""
    class_sizes: list[int] = []
    """images of each of the model's classes"""
    class_correct: dict[str, list[int]] = {}
    """by name, how many of them are classified correctly"""
    classes: list[str] = []
    """the data's in their order, where their labels stand for other numbers than the model's"""
    preprocessing: dict[str, str] = {}
    surrogate: str = ""
    surrogate_weights: str = ""
    distances: dict[str, float] = {}
    radii: dict[str, list[float | None]] = {}
    """by attack that looks for the nearest adversary, its distance from each image: 0 of one that is misclassified
    anyway, null where none was found"""
    success: dict[str, float] = {}
    """by targeted attack, the share of the attacked images that is classified as the target"""
    own: dict[str, str] = {}
    until: float | None = None
    """half the width of the widest 95 % interval, in points, for which the number of images was found"""
    frontier: str = ""
    """of the networks that the examples of a frontier were made on"""

    def __post_init__(self) -> None:
        if not self.records or "clean" not in self.outcomes:
            raise ValueError("no records, or no outcomes of the clean images")
        n = self.records[0].n
        accuracies = {record.attack: record.accuracy for record in self.records}
        for name, digits in self.outcomes.items():
            if len(digits) != n or digits.strip("01"):
                raise ValueError(f"the outcomes of {name} are not {n} digits of 0 and 1")
            if name in accuracies and not math.isclose(accuracies[name], digits.count("1") / n, abs_tol=1e-9):
                raise ValueError(f"the accuracy of {name} is not that of its outcomes")
        lists = (self.class_names, self.class_sizes, *self.class_correct.values())
        if self.class_sizes and (len({len(each) for each in lists}) > 1 or sum(self.class_sizes) != n):
            raise ValueError(f"the classes' counts are not those of {n} images")


class Card(msgspec.Struct):
    """What a weights file says of itself; files of earlier versions say less."""

    method: str = ""
    data: str = ""
    model: str = ""
    classes: int = 2
    class_names: list[str] = []
    """in the order of the logits; none of a model whose data have no names for their classes"""
    preprocessing: dict[str, str] = {}
    images: str = ""
    """digest of the data set, if it is the user's own"""
    channels: int = 1
    shape: tuple[int, int, int] = (0, 0, 0)
    recipe: str = ""
    norm: Norm = "linf"
    eps: float = 0.0
    epochs: int = 0
    seed: int = 0
    training_images: int = 0
    extra: str = ""
    init: str = ""
    run: str = ""
    checkpoint: str = ""
    epoch: int = 0
    validation: dict[str, float] | None = None


class VerdictRow(msgspec.Struct, forbid_unknown_fields=True):
    """A verdict of a diagnosis."""

    name: str
    passed: Literal["pass", "warn", "fail"]
    number: float | None
    unit: str
    sentence: str
    advice: str


class DiagnosisFile(msgspec.Struct, forbid_unknown_fields=True):
    """A result of `advalign diagnose`."""

    source: str
    model: str
    data: str
    images: str
    seed: int
    batch_size: int
    n: int
    threat: str
    verdicts: list[VerdictRow]
    accuracy_by_steps: dict[str, float]
    accuracy_by_radius: dict[str, float]
    environment: dict[str, str]
    note: str = ""
    class_names: list[str] = []


class CostFile(msgspec.Struct, forbid_unknown_fields=True):
    """What an attack on a setting of a frontier took, beside the file of its examples."""

    seconds: float
    forward: int
    backward: int
    trail: dict[str, float]


class FrontierMember(msgspec.Struct, forbid_unknown_fields=True):
    """One of the two networks of a frontier."""

    method: str
    model: str
    weights: str
    """digest of its file, or of its tensors"""
    run: str = ""


class FrontierPoint(msgspec.Struct, forbid_unknown_fields=True):
    """What a setting classifies correctly: a digit for each image, 1 if it does."""

    robust: str
    """under every example shown"""
    sources: dict[str, str]
    """by the network or setting that the examples were made on; `clean` are the images themselves"""
    floor: str = ""
    """what no network in the accurate one's place could lose; empty where no floor is known"""


class FrontierFile(msgspec.Struct, forbid_unknown_fields=True):
    """`frontier.json`: the settings between two networks, from the accurate to the robust one."""

    method: str
    robust: FrontierMember
    accurate: FrontierMember
    data: str
    images: str
    """digest of the data set"""
    threat: str
    images_held_out: str
    """in words, which images the setting was chosen on"""
    give: float
    rule: str
    curve_attack: str
    attacks: list[str]
    """of the chosen setting and the robust network"""
    settings: list[dict[str, Any]]
    chosen: int
    """the number of the chosen setting"""
    held_out: list[FrontierPoint]
    test: list[FrontierPoint]
    environment: dict[str, str]
    run: str = ""
    """of the chosen network"""
    note: str = ""
    warnings: list[str] = []
    further: list[FrontierMember] = []
    """robust networks of a soup beside the first two"""
    options: dict[str, Any] = {}
    """what else the command that repeats it names: flags without hyphens"""

    def __post_init__(self) -> None:
        for points in (self.held_out, self.test):
            if len(points) != len(self.settings) or not 0 <= self.chosen < len(points):
                raise ValueError(f"{len(points)} points of {len(self.settings)} settings, number {self.chosen} chosen")
            digits = [each for point in points for each in (point.robust, *point.sources.values(), point.floor) if each]
            if len({len(each) for each in digits}) != 1 or any(each.strip("01") for each in digits):
                raise ValueError("the outcomes are not one digit of 0 and 1 for each image")
            for point in points:
                if "clean" not in point.sources:
                    raise ValueError("no outcomes of the clean images")
                worst = "".join(
                    "1" if set(column) == {"1"} else "0" for column in zip(*point.sources.values(), strict=True)
                )
                if worst != point.robust:
                    raise ValueError("the robust images are not those that withstand every example")


class StudyFile(msgspec.Struct, forbid_unknown_fields=True):
    """`study.json`, by which a folder is known as a study's."""

    study: str
    title: str
    failures: dict[str, str]


def check_card(card: Any, path: Path) -> dict[str, Any]:
    """Return the card of a weights file if its fields have the types that they must have.

    Raises:
        UserError: the first field that has not.
    """
    if not isinstance(card, dict):
        raise UserError(f"{path} is damaged or not of advalign: its card is no JSON object")
    try:
        msgspec.convert(card, Card)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is damaged or not of advalign: its card is wrong ({str(error)[:200]})") from None
    return card


def write_checked_json(path: Path, content: Mapping[str, Any], run: str = "") -> None:
    """Write an object as indented JSON with its format version and checksum, atomically.

    Args:
        run: the id of the run that the object belongs to and does not name; part of the checksum.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(path, json.dumps(with_checksum(content, run), indent=2) + "\n")


def write_checked_lines(path: Path, rows: Sequence[Mapping[str, Any]], run: str = "") -> None:
    """Write objects as JSON Lines, each with its checksum, atomically; at least one.

    A checksum is also over the line's number and how many there are, so that a line that is lost is noticed.

    Args:
        run: as in `write_checked_json`.

    Raises:
        UserError: the file cannot be written.
    """
    lines = (with_checksum(row, _place(run, number, len(rows))) for number, row in enumerate(rows, 1))
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))


def read_checked_json(path: Path, kind: type[Kind], remedy: str, run: str = "") -> dict[str, Any]:
    """Read an object and check it against its checksum and schema; return it as it stands in the file.

    Args:
        remedy: what to do about a damaged file, as the end of a sentence.
        run: the id of the run that it must belong to; earlier versions left it out of the checksum.

    Raises:
        UserError: the file is missing, damaged, of a newer version, another run's, or something else.
    """
    return _checked(_parsed(path, _text(path), remedy), path, kind, remedy, "", run)


def read_checked_lines(path: Path, kind: type[Kind], remedy: str, run: str = "") -> list[dict[str, Any]]:
    """Read JSON Lines as `read_checked_json` reads an object; a missing file has none.

    Raises:
        UserError: a line is damaged, of a newer version, or something else, or lines are missing.
    """
    if not present(path):
        return []
    lines = _text(path).splitlines()
    require(bool(lines), lambda: f"{path} is damaged, it is empty: {remedy}")
    contents = [_parsed(path, text, remedy, f", line {number}") for number, text in enumerate(lines, 1)]
    return [
        _checked(content, path, kind, remedy, f", line {number}", _place(run, number, len(lines)))
        for number, content in enumerate(contents, 1)
    ]


def _place(run: str, number: int, total: int) -> str:
    return f"{run}, line {number} of {total}"


def with_checksum(content: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Return an object as it is written: with the format version and the checksum of everything else.

    Args:
        place: what the checksum is over as well: the run that the object belongs to, and its line.
    """
    content = {**content, "format": JSON_FORMAT}
    return {**content, "checksum": _checksum(content, place)}


def _checksum(content: Mapping[str, Any], place: str) -> str:
    return digest(json.dumps(content, sort_keys=True), place)


def _text(path: Path) -> str:
    try:
        return read_content(path).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is not text") from None


def _parsed(path: Path, text: str, remedy: str, line: str = "") -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}{line} is damaged ({str(error)[:100]}): {remedy}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}{line} is damaged or not of advalign: it is no JSON object; {remedy}")
    return content


def _checked(
    content: dict[str, Any], path: Path, kind: type[msgspec.Struct], remedy: str, line: str, place: str
) -> dict[str, Any]:
    version = content.get("format", 0)
    checksum = content.pop("checksum", None)
    if checksum is None:
        note_unsealed(path)
    elif all(checksum != _checksum(content, each) for each in (place, "")):  # the latter of earlier versions
        others = ", or lines are missing or another run's" if line else " or is another run's" if place else ""
        raise UserError(f"{path}{line} is damaged or was edited{others}, its checksum does not fit: {remedy}")
    if version not in range(JSON_FORMAT + 1):
        raise UserError(f"{path} was written by a newer version of advalign (format {version}): upgrade advalign")
    content.pop("format", None)
    try:
        msgspec.convert(content, kind)
    except (msgspec.ValidationError, ValueError) as error:
        raise UserError(f"{path}{line} is damaged or not of advalign ({str(error)[:200]}): {remedy}") from None
    return content
