"""What a study has come to, at any state: its table beside the published one, its figures, its records, on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean

from advalign import attacks
from advalign.attacks.names import parse_name
from advalign.errors import UserError, require
from advalign.report.features import explained, feature_map, feature_maps, few
from advalign.report.page import FigureSection, TableSection, TextSection, write_page
from advalign.report.sweeps import CurvePoint, sweep_curves, trade_off_curves
from advalign.report.tables import NOISE, Row, Table, marks
from advalign.runs import Record, find_weights
from advalign.runtime.device import pick_device
from advalign.runtime.environment import environment
from advalign.runtime.files import write_atomically, write_lines
from advalign.studies.context import ExecutionContext
from advalign.studies.job import Job, dataset
from advalign.studies.study import CLEAN, Column, FigureBuilder, Study
from advalign.threats import Linf

ROBUST = "PGD"
"""the heading of the column that figures take for robust accuracy: of all test images, at every scale"""


def _spelling(attack: str) -> str:
    return str(attacks.parse(attack, threat=Linf(8 / 255)))


# The words that a reader of a column needs who knows the attack's name from elsewhere.
_ATTACKS = {
    _spelling("cw"): "C&W is the L2 attack with c = 1 fixed, κ = 0, 1000 steps, lr .01, which the paper's settings "
    "spell: nothing holds it inside the threat, and it measures the scale of the logits as much as robustness",
    _spelling('pgd(loss="margin", steps=100)'): "CW-inf is PGD on the margin, 100 steps, inside the threat",
}
_MARK = "study.json"
"""the file by which a folder is known as a study's"""


@dataclass(frozen=True)
class Results:
    """A study with its jobs, whatever of them is done."""

    study: Study
    jobs: tuple[Job, ...]
    context: ExecutionContext
    out: Path
    failures: dict[str, str] = field(default_factory=dict)
    """why a job failed, by its run's id"""

    def records(self) -> list[Record]:
        """Return every accuracy that the table is made of."""
        return [record for job in self.jobs for record in self._known(job).values()]

    def table(self) -> Table:
        """Tabulate the accuracies; below a row of ours the published one and the difference, where there is one."""
        headings = [column.heading for column in self.study.columns]
        rows = {name: self._row(name) for name in self.study.rows}
        best, faint = marks(list(rows.values()), headings)
        lines: list[tuple[str, ...]] = []
        at = []
        for name, row in rows.items():
            at.append(len(lines))
            lines.append((self._label(name), *(self._spelled(row, heading) for heading in headings)))
            if numbers := self.study.published.get(name):
                lines += _published(name, numbers, row, headings)
        for name, numbers in self.study.published.items():
            lines += [] if name in rows else _published(name, numbers, Row(name, (), ()), headings)
        best, faint = (frozenset((at[i], j) for i, j in places) for places in (best, faint))
        return Table(("method", *headings), tuple(lines), best, self._caption(), faint=faint)

    def curves(self, robust: str) -> dict[str, list[CurvePoint]]:
        """Return clean accuracy and that of the column `robust` along each curve of the study, as far as measured."""
        headings = {column.heading: column for column in self.study.columns}
        curves: dict[str, list[CurvePoint]] = {}
        if not {CLEAN, robust} <= headings.keys():
            return curves
        for cell in self.study.cells:
            row = self._row(cell.row)
            by_seed = [row.accuracies(heading) for heading in (CLEAN, robust)]
            seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
            clean, withstood = (tuple(found[seed] for seed in seeds) for found in by_seed)
            if cell.curve and seeds:
                curves.setdefault(cell.curve, []).append(CurvePoint(cell.at, clean, withstood))
        return curves

    def write(self, *, figures: bool = True) -> None:
        """Write the table, the records, the page and its parts into the study's folder.

        A figure that cannot be drawn is left out, and the page says why.

        Raises:
            UserError: the folder is another study's, or cannot be written to.
        """
        table, absent = self.table(), list[str]()
        plates: list[FigureSection | TableSection | TextSection] = []
        for draw in self.study.figures if figures else ():
            try:
                plates += [plate] if (plate := draw(self)) is not None else []
            except Exception as error:  # a study's own may raise anything
                absent.append(f"A figure is missing: {type(error).__name__}: {error}".splitlines()[0])
        mark = {"study": self.study.name, "title": self.study.title, "failures": self.failures}
        write_atomically(self.out / _MARK, json.dumps(mark, indent=1) + "\n")
        write_lines(self.out / "records.jsonl", [asdict(record) for record in self.records()])
        write_atomically(self.out / "table.md", table.markdown() + "\n")
        done = sum(job.finished for job in self.jobs)
        introduction = [f"{done} of {len(self.jobs)} cells are finished."]
        if self.study.declared:
            plates.append(TextSection("The study as it was declared", {self.study.name: self.study.declared}))
        write_page(
            self.out / "report.html", self.study.title, introduction, table, plates, environment(), absent=absent,
            parts=self.out / "report-files",
        )  # fmt: skip

    def failures_before(self) -> dict[str, str]:
        """Return what an earlier call has noted of cells that failed.

        Raises:
            UserError: the folder holds something else than this study.
        """
        mark = self.out / _MARK
        if not mark.exists():
            taken = [name for name in ("records.jsonl", "table.md", "report.html") if (self.out / name).exists()]
            require(not taken, lambda: f"{self.out} holds another {taken and taken[0]}: name another folder with --out")
            return {}
        try:
            content = json.loads(mark.read_text())
            study, failures = (content["study"], content["title"]), dict(content["failures"])
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{mark} is damaged: remove it") from None
        ours = (self.study.name, self.study.title)
        require(study == ours, lambda: f"{self.out} is the folder of {study[1]!r}: name another with --out")
        return failures

    def overview(self) -> list[str]:
        """Return a line on each job: how far it is."""
        surrogate = self.jobs[0].surrogate
        lines = [] if surrogate is None else [f"surrogate: {surrogate.trained}: {surrogate.run.path}"]
        for job in self.jobs:
            measured = len(self._known(job))
            status = "finished" if job.finished else f"{job.trained}, {measured} of {len(job.columns)} columns measured"
            if job.run.id in self.failures:
                status += f", failed: {self.failures[job.run.id]}"
            lines.append(f"{job.name}: {status}: {job.run.path}")
        return lines

    def _known(self, job: Job) -> dict[Column, Record]:
        """Return what was measured of a job; nothing, where its files cannot be read, which carrying it out tells."""
        try:
            return job.records()
        except UserError:
            return {}

    def _row(self, name: str) -> Row:
        """Return a row's records, each under its column's heading."""
        jobs = [job for job in self.jobs if job.cell.row == name]
        found = [(column, record) for job in jobs for column, record in self._known(job).items()]
        return Row(name, (), tuple(replace(record, attack=column.heading) for column, record in found))

    def _spelled(self, row: Row, heading: str) -> str:
        """Spell mean and spread, and how many of the seeds that are planned were measured, if not all."""
        column = next(column for column in self.study.columns if column.heading == heading)
        planned = sum(job.cell.row == row.method and column in job.columns for job in self.jobs)
        measured = len(row.accuracies(heading))
        told = row.cell(heading).partition(" (")[0]
        return told if measured in (0, planned) else f"{told} ({measured} of {planned} seeds)"

    def _label(self, row: str) -> str:
        return f"{row} (failed)" if self._reasons(row) else row

    def _reasons(self, row: str) -> list[str]:
        return [self.failures[job.run.id] for job in self.jobs if job.cell.row == row and job.run.id in self.failures]

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
        notes.append(NOISE)
        if len({cell.recipe.seed for cell in cells}) > 1:
            notes.append("±: standard deviation over seeds")
        if study.published:
            notes.append(f"paper: {study.source}; difference: ours − paper, in points")
        reasons: dict[str, list[str]] = {}
        for row in study.rows:
            for reason in self._reasons(row):
                reasons.setdefault(reason, []).append(row)
        notes += [f"failed: {', '.join(dict.fromkeys(rows))}: {reason}" for reason, rows in reasons.items()]
        return "; ".join(notes) + "."

    def _test_images(self) -> str:
        """Tell how many the columns are measured on: the usual number, and those that have another."""
        headings: dict[int, list[str]] = {}
        for column in self.study.columns:
            job = next(job for job in self.jobs if column in job.columns)
            headings.setdefault(job.n(column), []).append(column.heading)
        return spelled_images(headings)


def spelled_images(headings: Mapping[int, Sequence[str]]) -> str:
    """Spell the number of test images that most columns are measured on, and the columns that have another."""
    usual, *others = sorted(headings, key=lambda n: -len(headings[n]))
    return ", ".join([str(usual), *(f"{n} for {' and '.join(headings[n])}" for n in others)])


def notes_on(spellings: Sequence[str]) -> list[str]:
    """Return what a reader must know of columns under these attacks."""
    return [note for attack, note in _ATTACKS.items() if any(parse_name(each).attack == attack for each in spellings)]


def trade_off(results: Results) -> FigureSection | None:
    """Draw clean against robust accuracy along the study's curves."""
    if not (curves := results.curves(ROBUST)):
        return None
    caption = "Up and to the right is better. Bars: one standard deviation over seeds, where there are several."
    if aside := ", ".join(cell.row for cell in results.study.cells if not cell.curve):
        caption += f" Not drawn: {aside}."
    return FigureSection("Trade-off", trade_off_curves(curves, ROBUST), caption)


def feature_plate(results: Results) -> FigureSection | None:
    """Draw the features of every model of the study's first seed that is trained, of five classes of test images."""
    jobs = [job for job in results.jobs if job.run.finished and job.cell.recipe.seed == 0]
    if not jobs:
        return None
    first, device = jobs[0], pick_device(results.context.device)
    data = dataset(first.cell.data, results.context.data_dir)
    images, names = few(data.test, classes=5, each=500), data.class_names[:5]
    maps = {
        job.cell.row: feature_map(
            find_weights(job.run.path, model=job.cell.model),
            images,
            first.threat,
            device,
            results.out / "features" / f"{job.run.id}.npz",
        )
        for job in jobs
        if (job.cell.data, job.threat) == (first.cell.data, first.threat)
    }
    return FigureSection("Features", feature_maps(maps, names), explained(images, first.threat, names))


def sweep(along: str) -> FigureBuilder:
    """Return what draws clean and robust accuracy along an argument of this name."""

    def draw(results: Results) -> FigureSection | None:
        if not (curves := results.curves(ROBUST)):
            return None
        caption = f"Accuracy along {along}. Bars: one standard deviation over seeds, where there are several."
        return FigureSection(f"Along {along}", sweep_curves(curves, along, ROBUST), caption)

    return draw


def _published(name: str, numbers: Mapping[str, float], row: Row, headings: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the published numbers of a row and, if some of ours are there, the difference."""
    there = [f"{numbers[heading]:.1f}" if heading in numbers else "" for heading in headings]
    ours = {heading: row.accuracies(heading).values() for heading in headings}
    gaps = [f"{mean(ours[h]) - numbers[h]:+.1f}" if ours[h] and h in numbers else "" for h in headings]
    return [(f"{name}, paper", *there), *([(f"{name}, difference", *gaps)] if any(gaps) else [])]


def _told(label: str, values: Sequence[object]) -> str:
    return f"{label}: {', '.join(dict.fromkeys(map(str, values))) or 'none yet'}"
