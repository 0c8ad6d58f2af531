"""Records grouped into the rows of a table: one row for each method and setting, over its training seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import mean, stdev

from advalign.errors import UserError
from advalign.objectives import BASES, Method, parse
from advalign.runs import Record
from advalign.training.planning import GUEST_METHODS
from advalign.training.recipes import Recipe

# What an accuracy depends on beside method, attack and training seed. The first group always shows: in the row where
# values differ, in the caption where they do not. The second shows only where two rows would look the same without it.
SHOWN_FIELDS = {
    "threat": "threat",
    "data": "data",
    "model": "model",
    "training_images": "training images",
    "epochs": "epochs",
    "checkpoint": "checkpoint",
    "n": "test images",
}
_FIELDS_AT_NEED = {
    "recipe": "recipe",
    "images": "data digest",
    "precision": "precision",
    "attack_seed": "attack seed",
    "batch_size": "batch",
}

Flags = Mapping[str, Mapping[str, str]]
"""The recipe of each run as flags of `advalign train`, by the run's id."""


@dataclass(frozen=True)
class Row:
    """Records that differ only in attack and training seed; `extras` separate the row from others of its method."""

    method: str
    extras: tuple[str, ...]
    records: tuple[Record, ...]
    distinguishing: tuple[int, ...] = ()
    """Which of the extras differ among our runs, or among weights without a training record, and not only between the
    two kinds."""

    @property
    def traits(self) -> tuple[str, ...]:
        """The extras that belong into the row's name in a figure."""
        return tuple(self.extras[i] for i in self.distinguishing)

    @property
    def competes(self) -> bool:
        """Whether the row is compared with the defenses, and not only with other natural models and first stages."""
        return any(is_defense(r.method) and not is_first_stage(r.method) for r in self.records)

    def accuracies(self, attack: str) -> dict[int, float]:
        """Return the accuracy of each seed, in per cent."""
        return {record.seed: 100 * record.accuracy for record in self.records if record.attack == attack}

    def variance(self, attack: str) -> float:
        """Return the squared standard error of the mean, over seeds; of a single seed, over the test images."""
        values = list(self.accuracies(attack).values())
        if len(values) > 1:
            return stdev(values) ** 2 / len(values)
        n = next(record.n for record in self.records if record.attack == attack)
        return values[0] * (100 - values[0]) / n

    def cell(self, attack: str, seeds: int | None = None) -> str:
        """Write mean and standard deviation, and how many of some seeds were measured if not all.

        Args:
            seeds: their number; that of the row's seeds if None.
        """
        values = list(self.accuracies(attack).values())
        if not values:
            return "–"
        spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
        seeds = len({record.seed for record in self.records}) if seeds is None else seeds
        return f"{mean(values):.1f}{spread}" + (f" ({len(values)} of {seeds} seeds)" if len(values) != seeds else "")


@cache
def is_defense(method: str) -> bool:
    """Return whether a method trains on adversarial images; True for a method that cannot be parsed."""
    parsed = _parsed(method)
    return parsed is None or parsed.defends


@cache
def is_first_stage(method: str) -> bool:
    """Return whether a method only trains the network from which another base starts; False if it cannot be parsed."""
    stages = [
        GUEST_METHODS[base.init_from](parse(name)) for name, base in BASES.items() if base.init_from in GUEST_METHODS
    ]
    parsed = _parsed(method)
    return parsed is not None and parsed.base.name in {stage.base.name for stage in stages}


def _parsed(method: str) -> Method | None:
    try:
        return parse(method)
    except UserError:  # with a part of the user's own, or the file name of weights without a training record
        return None


def group_rows(records: Sequence[Record], flags: Flags | None = None) -> tuple[list[Row], list[str]]:
    """Group records into rows; also return the names of the columns that separate rows of one method.

    Recipes are separated by the flags in which they differ, or by their digests where no flags are known.
    """
    keys = (*SHOWN_FIELDS, *_FIELDS_AT_NEED)
    groups: dict[tuple[object, ...], list[Record]] = {}
    for record in dict.fromkeys(records):
        groups.setdefault((record.method, *(getattr(record, key) for key in keys)), []).append(record)
    groups = {(*key, *run): part for key, group in groups.items() for run, part in _by_run(group).items()}
    first = [group[0] for group in groups.values()]
    shown = [key for key in SHOWN_FIELDS if len({getattr(record, key) for record in first}) > 1]
    for key in (*_FIELDS_AT_NEED, "run"):
        if len({_row_label(record, shown) for record in first}) < len(first):
            shown.append(key)
    labels = {**SHOWN_FIELDS, **_FIELDS_AT_NEED, "run": "run"}
    ours, others = ([record for record in first if bool(record.run) == known] for known in (True, False))
    distinguishing = tuple(
        i
        for i, key in enumerate(shown)  # of others the checkpoint is the file, and the file names them already
        if _differ(ours, key) or (key != "checkpoint" and _differ(others, key))
    )
    rows = [
        Row(group[0].method, _row_label(group[0], shown)[1:], tuple(group), distinguishing)
        for group in groups.values()
    ]  # fmt: skip
    if "recipe" in shown:
        rows = _with_flags(rows, shown.index("recipe"), flags or {})
    return rows, [labels[key] for key in shown]


def field_text(record: Record, key: str) -> str:
    """Write a field of a record; how weights without a training record were trained is unknown."""
    known = record.run or key not in ("training_images", "epochs", "recipe")
    return str(getattr(record, key)) if known else "unknown"


def _row_label(record: Record, keys: Sequence[str]) -> tuple[str, ...]:
    return (record.method, *(field_text(record, key) for key in keys))


def _differ(records: Sequence[Record], key: str) -> bool:
    return len({field_text(record, key) for record in records}) > 1


def _by_run(group: Sequence[Record]) -> dict[tuple[str, ...], list[Record]]:
    """Split records by run where one seed has several runs: they differ in what no record holds, such as guests."""
    runs_of = {(record.seed, record.run) for record in group}
    if len(runs_of) == len({seed for seed, _ in runs_of}):
        return {(): list(group)}
    runs: dict[tuple[str, ...], list[Record]] = {}
    for record in group:
        runs.setdefault((record.run,), []).append(record)
    return runs


def _with_flags(rows: Sequence[Row], column: int, flags: Flags) -> list[Row]:
    """Replace digests of recipes by the flags in which otherwise equal rows differ."""
    row_flags = [flags.get(row.records[0].run, {}) for row in rows]
    others = [(row.method, *row.extras[:column], *row.extras[column + 1 :]) for row in rows]
    alike: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for other, recipe in zip(others, row_flags, strict=True):
        if recipe:
            alike.setdefault(other, []).append(recipe)
    names = [
        name for name in Recipe.__slots__ if any(len({r.get(name) for r in recipes}) > 1 for recipes in alike.values())
    ]
    texts = [", ".join(f"{name}={recipe[name]}" for name in names if name in recipe) for recipe in row_flags]
    cells = list(zip(others, texts, strict=True))
    return [  # the digest stays where no flag separates two rows, such as with another guest
        replace(row, extras=(*row.extras[:column], text, *row.extras[column + 1 :]))
        if text and cells.count((other, text)) == 1
        else row
        for row, (other, text) in zip(rows, cells, strict=True)
    ]
