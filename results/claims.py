"""Tables on VFD-Adv's claims: the change by the plug-in beside the published one, and sweeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

from advalign.attacks.names import parse_name
from advalign.errors import require, unknown
from advalign.report.noise import NEAR, NOISE, inside_noise, mark_best
from advalign.report.rows import Row
from advalign.report.tables import Table
from advalign.runs import Record, read_records
from advalign.studies import SCALES, STUDIES, Column, Study
from advalign.studies.paper import TABLE_BASES
from advalign.studies.results import notes_on, numbers_of_images

_CLAIMED = ("clean", "PGD", "FGSM", "C&W", "AA", "black-box PGD")
_SUMMARY = ("clean", "PGD", "CW-inf", "AA", "black-box PGD")
_ALONG = {"figure4a": "layer", "figure4b": "weight"}
_NOT_MEASURED = "–"
_NO_ROW = Row("", (), ())


def study_in(folder: Path) -> tuple[Study, list[Record]]:
    """Return the study of a folder `NAME-SCALE`, and its records.

    Raises:
        UserError: an unknown name or scale, no records, or a damaged file.
    """
    name, _, scale = folder.name.rpartition("-")
    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    if scale not in SCALES:
        raise unknown("scale", scale, SCALES)
    records = read_records(folder / "records.jsonl")
    require(bool(records), lambda: f"no records in {folder}")
    return STUDIES[name](SCALES[scale]), records


def claims(study: Study, records: Sequence[Record]) -> Table:
    """Tabulate the change by VFD on each base, in points, above the published change; a dash for missing numbers.

    A change in parentheses is inside the noise, by the rule of the other tables.
    """
    attacks, rows = _attacks(study, records, _CLAIMED), _rows(study, records)
    lines = []
    for base in TABLE_BASES:
        joined = f"{base}+vfd"
        after, before = study.published[joined], study.published[base]
        ours = [_change(rows[joined], rows[base], attack) for attack in attacks.values()]
        theirs = [_signed(after[each] - before[each]) if each in after else _NOT_MEASURED for each in attacks]
        lines += [(f"{base}, ours", *ours), (f"{base}, paper", *theirs)]
    notes = [
        "Change in points where VFD joins a base",
        *_setting(records, attacks),
        f"in parentheses: not distinguishable from none, {NEAR}",
        f"{_NOT_MEASURED}: not measured yet, or not in the paper",
        *notes_on(column for column in study.columns if attacks.get(column.heading, _NOT_MEASURED) != _NOT_MEASURED),
        f"paper: {study.source}",
    ]
    return Table(("VFD on", *attacks), tuple(lines), frozenset(), "; ".join(notes) + ".")


def study_table(study: Study, records: Sequence[Record]) -> Table:
    """Tabulate a summary of a study: clean, white-box and black-box accuracy of each row."""
    attacks, rows = _attacks(study, records, _SUMMARY), _rows(study, records)
    cells = [cell for cell in study.cells if rows[cell.method].records]
    best, faint = mark_best([rows[cell.method] for cell in cells], list(attacks.values()))
    lines = tuple((cell.row, *(rows[cell.method].cell(attack) for attack in attacks.values())) for cell in cells)
    notes = ["Accuracy in %", *_setting(records, attacks), NOISE]
    return Table(("method", *attacks), lines, best, "; ".join(notes) + ".", faint=faint)


def sweep_table(study: Study, records: Sequence[Record]) -> Table:
    """Tabulate accuracies along a study's sweep and, if plain TRADES was measured, the changes from it."""
    attacks, rows = _attacks(study, records, [column.heading for column in study.columns]), _rows(study, records)
    positions = [cell.at if isinstance(cell.at, str) else f"{cell.at:g}" for cell in study.cells]
    cells = dict(zip(positions, (rows[cell.method] for cell in study.cells), strict=True))
    plain = rows.get("trades", _NO_ROW)
    headings, changes = list(attacks), dict.fromkeys(cells, ())
    notes = ["Accuracy in %", *_setting(records, attacks), NOISE, f"{_NOT_MEASURED}: not measured yet"]
    if plain.records:
        headings += [f"Δ {heading}" for heading in attacks]
        notes.append("Δ: change in points from TRADES; in parentheses: inside the noise of the two")
        changes = {at: tuple(_change(row, plain, attack) for attack in attacks.values()) for at, row in cells.items()}
    lines = tuple((at, *(row.cell(attack) for attack in attacks.values()), *changes[at]) for at, row in cells.items())
    best, faint = mark_best(list(cells.values()), list(attacks.values()))
    return Table((_ALONG[study.name], *headings), lines, best, "; ".join(notes) + ".", faint=faint)


def _attacks(study: Study, records: Sequence[Record], headings: Sequence[str]) -> dict[str, str]:
    """Return the attack of each heading as records name it, for a black box with the surrogate."""
    columns = {column.heading: column for column in study.columns}
    return {
        heading: next((record.attack for record in records if _is_of(record, columns[heading])), _NOT_MEASURED)
        for heading in headings
    }


def _is_of(record: Record, column: Column) -> bool:
    if column.black_box:
        name = parse_name(record.attack)
        return bool(name.surrogate) and name.attack == column.attack
    return record.attack == column.attack


def _rows(study: Study, records: Sequence[Record]) -> dict[str, Row]:
    """Return a row for each method that the study declares or the records have; it may have no records."""
    methods = dict.fromkeys([*(cell.method for cell in study.cells), *(record.method for record in records)])
    return {method: Row(method, (), tuple(r for r in records if r.method == method)) for method in methods}


def _change(row: Row, base: Row, attack: str) -> str:
    """Write the change from the base over the seeds that both have, in parentheses if it is inside the noise."""
    if row is base:
        return ""
    seeds = row.accuracies(attack).keys() & base.accuracies(attack).keys()
    if not seeds:
        return _NOT_MEASURED
    row, base = (replace(each, records=tuple(r for r in each.records if r.seed in seeds)) for each in (row, base))
    change = _signed(mean(row.accuracies(attack).values()) - mean(base.accuracies(attack).values()))
    return f"({change})" if inside_noise(row, base, attack) else change


def _signed(change: float) -> str:
    return f"{round(change, 1) + 0.0:+.1f}"  # + 0.0, for no change is not -0.0


def _setting(records: Sequence[Record], attacks: Mapping[str, str]) -> list[str]:
    """Return notes on the setting of the records: the values of each field, test images, surrogates."""
    notes = [
        f"{key.replace('_', ' ')}: {', '.join(sorted({str(getattr(record, key)) for record in records}))}"
        for key in ("data", "model", "threat", "epochs", "training_images", "seed")
    ]
    images: dict[int, list[str]] = {}
    for heading, attack in attacks.items():
        for n in {record.n for record in records if record.attack == attack}:
            images.setdefault(n, []).append(heading)
    notes.append(f"test images: {numbers_of_images(images)}")
    if surrogates := {surrogate for attack in attacks.values() if (surrogate := parse_name(attack).surrogate)}:
        notes.append(f"black box: made on {', '.join(sorted(surrogates))}")
    seeds = [{record.seed for record in records if record.method == each} for each in {r.method for r in records}]
    if min(map(len, seeds)) == 1:
        notes.append("a row of one seed does not show how far another seed would move it")
    return notes
