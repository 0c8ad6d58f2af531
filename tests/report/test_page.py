"""The page: one sound file that loads nothing, and does in a browser what it says."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from tests.markup import Checked
from tests.samples import RECORD, records

from advalign.report import report_on
from advalign.report.page import FigureSection, TableSection, TextSection, write_page
from advalign.report.svg import svg
from advalign.report.tables import Table
from advalign.runs import append_records

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def page_of(folder: Path, *more) -> Path:
    append_records(folder / "records.jsonl", [*records(), *more])
    report_on([folder], folder / "page.html")
    return folder / "page.html"


def test_the_page_is_one_sound_file_that_loads_nothing(tmp_path: Path):
    text = page_of(tmp_path).read_text()
    page = Checked(text)
    assert "91.0 ± 1.4" in page.cells
    assert page.loaded
    assert all(each.startswith(("#", "data:")) for each in page.loaded)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert "aria-sort" in text
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_marks_tell_their_numbers(tmp_path: Path):
    titles = Checked(page_of(tmp_path).read_text()).titles
    assert "trades: clean 91.0 ± 1.4 %, robust 52.0 ± 2.8 %, 2 seeds" in titles


def test_every_table_and_figure_is_a_file_that_the_page_links_to(tmp_path: Path):
    links = Checked(page_of(tmp_path).read_text()).links
    files = {path.relative_to(tmp_path).as_posix() for path in (tmp_path / "page-files").iterdir()}
    assert set(links) == files
    assert {link.rpartition(".")[2] for link in links} == {"md", "tex", "csv", "svg", "pdf", "png"}
    (pdf,) = (tmp_path / "page-files").glob("*.pdf")
    assert pdf.read_bytes().startswith(b"%PDF")
    with Image.open(pdf.with_suffix(".png")) as image:
        assert image.width > 500
    assert "<svg" in pdf.with_suffix(".svg").read_text()


@pytest.mark.slow
def test_what_is_not_shown_is_named(tmp_path: Path):
    text = page_of(tmp_path).read_text()
    for section in ("Accuracy by class", "Adversarial examples", "Accuracy over the radius", "Training", "Verdicts"):
        assert f"<li>{section}" in text


@pytest.mark.slow
def test_what_cannot_be_compared_is_in_tables_of_its_own(tmp_path: Path):
    others = [replace(RECORD, run=f"{i}", **change) for i, change in enumerate(({"threat": "L2(1)"}, {"n": 9}))]
    append_records(tmp_path / "records.jsonl", [*records(), *others])
    tables = report_on([tmp_path], tmp_path / "page.html")
    assert [len(table.rows) for table in tables] == [3, 1, 1]


def test_markup_in_a_record_is_escaped(tmp_path: Path):
    evil = "<img onerror=alert(1)>"
    both = [replace(RECORD, method=evil, attack=attack) for attack in ("clean", "worst(fgsm)")]
    append_records(tmp_path / "records.jsonl", both)
    report_on([tmp_path / "records.jsonl"], tmp_path / "page.html")
    assert evil not in (tmp_path / "page.html").read_text()
    Checked((tmp_path / "page.html").read_text())


def test_sections_come_in_order_and_without_parts_nothing_else_is_written(tmp_path: Path):
    figure = Figure()
    figure.add_subplot().imshow(np.zeros((2, 2)))
    table = Table(("a",), (("1",),), frozenset(), "")
    sections = [
        TextSection("Third", {"one": "a < b"}),
        FigureSection("First", figure, "seen"),
        TableSection("Second", table),
    ]
    write_page(tmp_path / "a.html", "title", ["begin"], None, sections, {}, missing=["nothing"])
    text = (tmp_path / "a.html").read_text()
    Checked(text)
    places = [
        text.index(word) for word in ("begin", "Third", "a &lt; b", "First", "data:image/png", "Second", "nothing")
    ]
    assert places == sorted(places)
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]


def test_the_same_figure_gives_the_same_svg():
    def drawn() -> str:
        figure = Figure()
        figure.add_subplot().plot([1, 2], [3, 4])
        return svg(figure, "name")

    assert drawn() == drawn()
    assert mpl.rcParams["svg.hashsalt"] is None


def in_browser(page: Path, *arguments: str) -> str:
    """Return the page's elements after its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}"]
    done = subprocess.run(
        [*command, "--allow-file-access-from-files", *arguments, "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_click_on_a_header_sorts_and_a_second_one_turns_the_order(tmp_path: Path):
    page = page_of(tmp_path, replace(RECORD, method="at", run="at", attack="fgsm"))
    script = """<script>
      const header = document.querySelectorAll("th")[1], rows = () =>
        [...document.querySelectorAll("table")[0].tBodies[0].rows].map((row) => row.cells[1].textContent).join(" ");
      header.firstChild.click(); document.body.dataset.once = rows() + " " + header.getAttribute("aria-sort");
      header.firstChild.click(); document.body.dataset.twice = rows() + " " + header.getAttribute("aria-sort");
    </script></body>"""
    page.write_text(page.read_text().replace("</body>", script))
    seen = in_browser(page)
    assert 'data-once="95.0 94.0 91.0 ± 1.4 – descending"' in seen
    assert 'data-twice="91.0 ± 1.4 94.0 95.0 – ascending"' in seen


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_phone_shows_the_page_without_scrolling_sideways(tmp_path: Path):
    page_of(tmp_path, *[replace(RECORD, attack=f"pgd(steps={i}, restarts=10)") for i in range(9)])
    phone = tmp_path / "phone.html"
    phone.write_text(
        '<iframe src="page.html" style="width:390px;border:0" onload="'
        "const page = this.contentDocument.documentElement; "
        'document.body.dataset.beyond = page.scrollWidth - page.clientWidth"></iframe>'
    )
    assert 'data-beyond="0"' in in_browser(phone)
