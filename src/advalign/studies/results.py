"""What a study has come to, at any state: its table beside the published one, its figures, its records, on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev

from advalign.report.features import explained, feature_map, feature_maps, few
from advalign.report.figures import png
from advalign.report.page import Plate, write_page
from advalign.report.sweeps import Point, sweep_curves, trade_off_curves
from advalign.report.tables import Table
from advalign.runs import Record
from advalign.runs.files import write_atomically, write_lines
from advalign.runtime import environment, pick_device
from advalign.studies.execute import Place
from advalign.studies.job import Job, dataset
from advalign.studies.study import CLEAN, Cell, Column, Draw, Study

ROBUST = "PGD"
"""the heading of the column that figures take for robust accuracy: of all test images, at every scale"""
_NOT_YET = "–"
# The words that a reader of a column needs who knows the attack's name from elsewhere.
_ATTACKS = {
    "cw": "C&W is the L2 attack with c = 1 fixed, κ = 0, 1000 steps, lr .01, which the paper's settings spell: nothing "
    "holds it inside the threat, and it measures the scale of the logits as much as robustness",
    "pgd(steps=100": "CW-inf is PGD on the margin, inside the threat",
}


@dataclass(frozen=True)
class Results:
    """A study with its jobs, whatever of them is done."""

    study: Study
    jobs: tuple[Job, ...]
    place: Place
    out: Path
    failures: dict[str, str] = field(default_factory=dict)
    """why a job failed, by its run's id"""

    def records(self) -> list[Record]:
        """Return every accuracy that the table is made of."""
        return [record for job in self.jobs for record in job.records().values()]

    def table(self) -> Table:
        """Tabulate the accuracies: ours, the published ones, and the difference, in blocks of rows."""
        columns, published = self.study.columns, self.study.published
        ours = {row: [self._values(row, column) for column in columns] for row in self.study.rows}
        rows = [(self._label(row), *map(self._spelled, values)) for row, values in ours.items()]
        for row, numbers in published.items():
            there = [f"{numbers[c.heading]:.1f}" if c.heading in numbers else "" for c in columns]
            rows.append((f"{row}, paper", *there))
        for row, measured in ours.items():
            numbers = published.get(row, {})
            gaps = [
                f"{mean(values) - numbers[column.heading]:+.1f}" if values and column.heading in numbers else ""
                for column, values in zip(columns, measured, strict=True)
            ]
            if any(gaps):
                rows.append((f"{row}, difference", *gaps))
        lines = list(ours.values())
        best = frozenset(
            (max(filled, key=lambda i: mean(lines[i][j])), j + 1)
            for j in range(len(columns))
            if len(filled := [i for i in range(len(lines)) if lines[i][j]]) > 1
        )
        return Table(("method", *(column.heading for column in columns)), tuple(rows), best, self._caption())

    def curves(self, robust: str) -> dict[str, list[Point]]:
        """Return clean accuracy and that of the column `robust` along each curve of the study, as far as measured."""
        headings = {column.heading: column for column in self.study.columns}
        curves: dict[str, list[Point]] = {}
        if not {CLEAN, robust} <= headings.keys():
            return curves
        for cell in self.study.cells:
            clean = self._values(cell.row, headings[CLEAN], cell)
            withstood = self._values(cell.row, headings[robust], cell)
            if cell.curve and clean and len(clean) == len(withstood):
                curves.setdefault(cell.curve, []).append(Point(cell.at, tuple(clean), tuple(withstood)))
        return curves

    def write(self) -> None:
        """Write the table, the records, the figures and the page into the study's folder."""
        table, plates = self.table(), [plate for draw in self.study.figures if (plate := draw(self)) is not None]
        write_lines(self.out / "records.jsonl", [asdict(record) for record in self.records()])
        write_atomically(self.out / "table.md", table.markdown() + "\n")
        write_atomically(self.out / "table.tex", table.latex() + "\n")
        for plate in plates:
            write_atomically(self.out / f"{re.sub(r'[^a-z0-9]+', '-', plate.heading.lower())}.png", png(plate.figure))
        done = sum(job.finished for job in self.jobs)
        introduction = [f"{done} of {len(self.jobs)} cells are finished."]
        write_page(self.out / "report.html", self.study.title, introduction, table, plates, environment())

    def overview(self) -> list[str]:
        """Return a line on each job: how far it is."""
        surrogate = self.jobs[0].surrogate
        lines = [] if surrogate is None else [f"surrogate: {surrogate.trained}: {surrogate.run.path}"]
        for job in self.jobs:
            measured = len(job.columns) - len(job.missing())
            status = "finished" if job.finished else f"{job.trained}, {measured} of {len(job.columns)} columns measured"
            lines.append(f"{job.name}: {status}: {job.run.path}")
        return lines

    def _values(self, row: str, column: Column, cell: Cell | None = None) -> list[float]:
        """Return the accuracies of a row, in per cent, a value a seed."""
        return [
            100 * found.accuracy
            for job in self.jobs
            if job.cell.row == row and (cell is None or job.cell.data == cell.data)
            if (found := job.records().get(column)) is not None
        ]

    def _spelled(self, values: list[float]) -> str:
        if not values:
            return _NOT_YET
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f} ({len(values)})" if len(values) > 1 else "")

    def _label(self, row: str) -> str:
        failed = [self.failures[job.run.id] for job in self.jobs if job.cell.row == row and job.run.id in self.failures]
        return f"{row} (failed: {failed[0]})" if failed else row

    def _caption(self) -> str:
        study, cells = self.study, [job.cell for job in self.jobs]
        notes = [
            "Accuracy in %",
            _told("data", [cell.data for cell in cells]),
            _told("model", [cell.model for cell in cells]),
            _told("threat", [job.threat for job in self.jobs]),
            _told("epochs", [cell.recipe.epochs for cell in cells]),
            _told("training images", [record.training_images for record in self.records()]),
            "checkpoint: best",
            _told("seeds", [cell.recipe.seed for cell in cells]),
            f"test images: {self._test_images()}",
        ]
        if any(column.black_box for column in study.columns) and study.surrogate is not None:
            notes.append(f"black box: made on a {study.surrogate.method} {study.surrogate.model}")
        notes += notes_on([column.attack for column in study.columns])
        if study.published:
            notes.append(f"paper: {study.source}; difference: ours − paper, in points")
        return "; ".join(notes) + "."

    def _test_images(self) -> str:
        """Tell how many the columns are measured on: the usual number, and those that have another."""
        headings: dict[int, list[str]] = {}
        for column in self.study.columns:
            headings.setdefault(self.jobs[0].n(column), []).append(column.heading)
        return spelled_images(headings)


def spelled_images(headings: Mapping[int, Sequence[str]]) -> str:
    """Spell the number of test images that most columns are measured on, and the columns that have another."""
    usual, *others = sorted(headings, key=lambda n: -len(headings[n]))
    return ", ".join([str(usual), *(f"{n} for {' and '.join(headings[n])}" for n in others)])


def notes_on(attacks: Sequence[str]) -> list[str]:
    """Return what a reader must know of columns under these attacks."""
    return [note for attack, note in _ATTACKS.items() if any(each.startswith(attack) for each in attacks)]


def trade_off(results: Results) -> Plate | None:
    """Draw clean against robust accuracy along the study's curves."""
    if not (curves := results.curves(ROBUST)):
        return None
    caption = "Up and to the right is better. Bars: one standard deviation over seeds, where there are several."
    return Plate("Trade-off", trade_off_curves(curves, ROBUST), caption)


def feature_plate(results: Results) -> Plate | None:
    """Draw the features of every model of the study's first seed that is trained, of five classes of test images."""
    jobs = [job for job in results.jobs if job.run.finished and job.cell.recipe.seed == 0]
    if not jobs:
        return None
    first, device = jobs[0], pick_device(results.place.device)
    data = dataset(first.cell.data, results.place.data_dir)
    images, names = few(data.test, classes=5, each=500), data.class_names[:5]
    maps = {
        job.cell.row: feature_map(
            job.run.path, images, first.threat, device, results.out / "features" / f"{job.run.id}.npz"
        )
        for job in jobs
        if (job.cell.data, job.threat) == (first.cell.data, first.threat)
    }
    return Plate("Features", feature_maps(maps, names), explained(images, first.threat, names))


def sweep(along: str) -> Draw:
    """Return what draws clean and robust accuracy along an argument of this name."""

    def draw(results: Results) -> Plate | None:
        if not (curves := results.curves(ROBUST)):
            return None
        caption = f"Accuracy along {along}. Bars: one standard deviation over seeds, where there are several."
        return Plate(f"Along {along}", sweep_curves(curves, along, ROBUST), caption)

    return draw


def _told(label: str, values: Sequence[object]) -> str:
    return f"{label}: {', '.join(dict.fromkeys(map(str, values))) or 'none yet'}"
