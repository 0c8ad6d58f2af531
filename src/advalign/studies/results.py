"""The results of a study, finished or not: its table beside the published numbers, its page, its records, on disk."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean

from advalign.attacks.spelled import remarks_on
from advalign.errors import require
from advalign.report.noise import NOISE, mark_best
from advalign.report.page import Section, TextSection, write_page
from advalign.report.rows import Row
from advalign.report.tables import Table
from advalign.runs import Record
from advalign.runs.formats import StudyFile, read_checked_json, write_checked_json, write_checked_lines
from advalign.runtime.environment import environment
from advalign.runtime.files import write_atomically
from advalign.studies.cells import Column
from advalign.studies.job import Job
from advalign.studies.progress import Progress
from advalign.studies.study import Study

_MARKER = "study.json"
"""the file that identifies a folder as a study's results"""


@dataclass(frozen=True)
class Results:
    """A study, its progress, and the failures of its jobs."""

    study: Study
    progress: Progress
    failures: dict[str, str] = field(default_factory=dict)
    """reasons by the run's id"""

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The study's jobs, in the order in which they are run."""
        return self.progress.jobs

    def records(self) -> list[Record]:
        """Return every accuracy in the table."""
        return self.progress.records()

    def table(self) -> Table:
        """Tabulate the accuracies; below each of our rows the published one and the difference, where there is one."""
        headings = [column.heading for column in self.study.columns]
        rows = {name: self.progress.row(name) for name in self.study.rows}
        best, faint = mark_best(list(rows.values()), headings)
        lines: list[tuple[str, ...]] = []
        line_of_row = []
        for name, row in rows.items():
            line_of_row.append(len(lines))
            label = f"{name} (failed)" if self._reasons(name) else name
            lines.append((label, *(self._accuracy(row, column) for column in self.study.columns)))
            if numbers := self.study.published.get(name):
                lines += _published_lines(name, numbers, row, headings)
        for name, numbers in self.study.published.items():
            lines += [] if name in rows else _published_lines(name, numbers, Row(name, (), ()), headings)
        best, faint = (frozenset((line_of_row[i], j) for i, j in cells) for cells in (best, faint))
        return Table(("method", *headings), tuple(lines), best, self._caption(), faint=faint)

    def write(self, *, figures: bool = True) -> None:
        """Write the table, the records, the page and its parts into the study's folder.

        A figure that cannot be drawn is left out, and the page names the reason.

        Raises:
            UserError: the folder belongs to another study, or cannot be written to.
        """
        table, missing, out = self.table(), list[str](), self.progress.out
        sections: list[Section] = []
        for draw in self.study.figures if figures else ():
            try:
                sections += [section] if (section := draw(self.progress)) is not None else []
            except Exception as error:  # a user's own builder may raise anything
                missing.append(f"A figure is missing: {type(error).__name__}: {error}".splitlines()[0])
        marker = {"study": self.study.name, "title": self.study.title, "failures": self.failures}
        write_checked_json(out / _MARKER, marker)
        if records := [asdict(record) for record in self.records()]:
            write_checked_lines(out / "records.jsonl", records)
        write_atomically(out / "table.md", table.markdown() + "\n")
        done = sum(job.finished for job in self.jobs)
        introduction = [*self.study.introduction, f"{done} of {len(self.jobs)} cells are finished."]
        if self.study.declared:
            sections.append(TextSection("The study as it was declared", {self.study.name: self.study.declared}))
        write_page(
            out / "report.html", self.study.title, introduction, table, sections, environment(), missing=missing,
            parts=out / "report-files",
        )  # fmt: skip

    def read_failures(self) -> dict[str, str]:
        """Return the failures that an earlier call has noted in the study's folder.

        Raises:
            UserError: the folder holds something else than this study.
        """
        marker = self.progress.out / _MARKER
        if not marker.exists():
            for name in ("records.jsonl", "table.md", "report.html"):
                file = self.progress.out / name
                require(
                    not file.exists(), lambda: f"{file.parent} holds another {name}: name another folder with --out"
                )
            return {}
        content = read_checked_json(marker, StudyFile, "remove it")
        study, failures = (content["study"], content["title"]), content["failures"]
        ours = (self.study.name, self.study.title)
        require(study == ours, lambda: f"{marker.parent} is the folder of {study[1]!r}: name another with --out")
        return failures

    def overview(self) -> list[str]:
        """Return a line on the progress of each job."""
        surrogate = self.jobs[0].surrogate
        lines = [] if surrogate is None else [f"surrogate: {surrogate.training_status}: {surrogate.run.path}"]
        for job in self.jobs:
            measured = f"{len(self.progress.measured(job))} of {len(job.columns)} columns measured"
            status = "finished" if job.finished else f"{job.training_status}, {measured}"
            if job.run.id in self.failures:
                status += f", failed: {self.failures[job.run.id]}"
            lines.append(f"{job.name}: {status}: {job.run.path}")
        return lines

    def _accuracy(self, row: Row, column: Column) -> str:
        """Write mean and spread, and how many of the planned seeds were measured if not all."""
        planned = sum(job.cell.row == row.method and column in job.columns for job in self.jobs)
        return row.cell(column.heading, planned)

    def _reasons(self, row: str) -> list[str]:
        return [self.failures[job.run.id] for job in self.jobs if job.cell.row == row and job.run.id in self.failures]

    def _caption(self) -> str:
        study, cells = self.study, [job.cell for job in self.jobs]
        notes = [
            "Accuracy in %",
            _values("data", [cell.data for cell in cells]),
            _values("model", [cell.model for cell in cells]),
            _values("threat", [job.threat for job in self.jobs]),
            _values("epochs", [cell.recipe.epochs for cell in cells]),
            _values("training images", [record.training_images for record in self.records()]),
            "checkpoint: best",
            _values("seeds", [cell.recipe.seed for cell in cells]),
            f"test images: {self._test_images()}",
        ]
        if any(column.black_box for column in study.columns) and study.surrogate is not None:
            notes.append(f"black box: made on a {study.surrogate.method} {study.surrogate.model}")
        notes += notes_on(study.columns)
        notes.append(NOISE)
        if len({cell.recipe.seed for cell in cells}) > 1:
            notes.append("±: standard deviation over seeds")
        if study.published:
            notes.append(f"paper: {study.source}; difference: ours − paper, in points")
        rows_by_reason: dict[str, list[str]] = {}
        for row in study.rows:
            for reason in self._reasons(row):
                rows_by_reason.setdefault(reason, []).append(row)
        notes += [f"failed: {', '.join(dict.fromkeys(rows))}: {reason}" for reason, rows in rows_by_reason.items()]
        return "; ".join(notes) + "."

    def _test_images(self) -> str:
        headings: dict[int, list[str]] = {}
        for column in self.study.columns:
            job = next(job for job in self.jobs if column in job.columns)
            headings.setdefault(job.n(column), []).append(column.heading)
        return numbers_of_images(headings)


def numbers_of_images(headings: Mapping[int, Sequence[str]]) -> str:
    """Write the number of test images of most columns, and the columns that have another number."""
    usual, *others = sorted(headings, key=lambda n: -len(headings[n]))
    return ", ".join([str(usual), *(f"{n} for {' and '.join(headings[n])}" for n in others)])


def notes_on(columns: Iterable[Column]) -> list[str]:
    """Return what a reader must know of the columns, each note once."""
    columns = list(columns)
    remarks = [
        f"{column.heading}: {remark}" for column in columns for remark in remarks_on([column.attack]).values()
    ]  # fmt: skip
    return list(dict.fromkeys([*(column.note for column in columns if column.note), *remarks]))


def _published_lines(
    name: str, numbers: Mapping[str, float], row: Row, headings: Sequence[str]
) -> list[tuple[str, ...]]:
    """Return the published numbers of a row and, if some of ours are measured, the difference."""
    published = [f"{numbers[heading]:.1f}" if heading in numbers else "" for heading in headings]
    ours = {heading: row.accuracies(heading).values() for heading in headings}
    gaps = [f"{mean(ours[h]) - numbers[h]:+.1f}" if ours[h] and h in numbers else "" for h in headings]
    return [(f"{name}, paper", *published), *([(f"{name}, difference", *gaps)] if any(gaps) else [])]


def _values(label: str, values: Sequence[object]) -> str:
    return f"{label}: {', '.join(dict.fromkeys(map(str, values))) or 'none yet'}"
