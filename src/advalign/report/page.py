"""One self-contained HTML page: tables and figures in a single file that opens offline; and each of them as files."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from advalign.report.figures import data_uri, png
from advalign.report.svg import inline, svg
from advalign.report.tables import Table
from advalign.runtime.files import write_atomically


class FigureSection(NamedTuple):
    """A figure with its heading and caption."""

    heading: str
    figure: Figure
    caption: str
    alt: str = ""
    """What the figure shows, for who does not see it; the caption if not given."""


class TableSection(NamedTuple):
    """A table with its heading."""

    heading: str
    table: Table


class TextSection(NamedTuple):
    """Lines to copy, such as commands, each group under a title of its own."""

    heading: str
    groups: Mapping[str, str]


def write_page(
    path: Path,
    title: str,
    introduction: Sequence[str],
    table: Table | None,
    plates: Sequence[FigureSection | TableSection | TextSection],
    environment: Mapping[str, str],
    *,
    absent: Sequence[str] = (),
    parts: Path | None = None,
) -> None:
    """Write the page; texts are escaped, figures embedded, and the browser is told to load nothing from elsewhere.

    Args:
        table: shown first, without a heading.
        plates: shown below, in this order.
        absent: what the page does not show, and why.
        parts: a folder below the page's own for each table as Markdown, LaTeX and CSV and each figure as SVG, PDF and
            PNG, to which the page then links; none are written if not given.

    Raises:
        UserError: a file cannot be written.
    """
    here = files("advalign.report")
    template = Environment(autoescape=True, trim_blocks=True).from_string((here / "page.html.j2").read_text())
    sections = [TableSection("", table)] if table else []
    blocks = []
    for section in (*sections, *plates):
        name = re.sub(r"[^a-z0-9]+", "-", (section.heading or "table").lower()).strip("-")
        links = {}
        if parts is not None:
            for ending, content in _files(section, name).items():
                write_atomically(parts / f"{name}.{ending}", content)
                links[ending] = f"{parts.relative_to(path.parent).as_posix()}/{name}.{ending}"
        figure = _embedded(section, name) if isinstance(section, FigureSection) else ""
        blocks.append({"section": section, "figure": figure, "links": links})
    style, script = (Markup((here / name).read_text()) for name in ("page.css", "sort.js"))
    write_atomically(
        path,
        template.render(
            title=title, introduction=introduction, blocks=blocks, absent=absent, environment=environment,
            style=style, script=script,
        ),
    )  # fmt: skip


def _files(section: FigureSection | TableSection | TextSection, name: str) -> dict[str, str | bytes]:
    """Return what a section gives to be used elsewhere, by file ending."""
    if isinstance(section, TableSection):
        table = section.table
        return {"md": table.markdown() + "\n", "tex": table.latex() + "\n", "csv": table.csv()}
    if isinstance(section, FigureSection):
        pdf = io.BytesIO()
        section.figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
        return {"svg": svg(section.figure, name), "pdf": pdf.getvalue(), "png": png(section.figure)}
    return {}


def _embedded(plate: FigureSection, name: str) -> Markup:
    """Return lines as SVG, in which the pointer finds them, and images as PNG."""
    if any(axes.images for axes in plate.figure.axes):
        return Markup('<img src="{}" alt="{}">').format(data_uri(plate.figure), plate.alt or plate.caption)
    return Markup(inline(plate.figure, name))
