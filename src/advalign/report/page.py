"""One self-contained HTML page of tables and figures that opens offline, and each of them as files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment
from markupsafe import Markup
from matplotlib.figure import Figure

from advalign.report.figures import data_uri, drawn, png
from advalign.report.svg import inline, svg
from advalign.report.tables import Table
from advalign.runtime.files import write_atomically


class FigureSection(NamedTuple):
    """A figure with its heading and caption."""

    heading: str
    figure: Figure
    caption: str
    alt: str = ""
    """A description for readers who do not see the figure; the caption if empty."""


class TableSection(NamedTuple):
    """A table with its heading."""

    heading: str
    table: Table


class TextSection(NamedTuple):
    """Lines to copy, such as commands, in groups with a title each."""

    heading: str
    groups: Mapping[str, str]


Section = FigureSection | TableSection | TextSection


def write_page(
    path: Path,
    title: str,
    introduction: Sequence[str],
    table: Table | None,
    sections: Sequence[Section],
    environment: Mapping[str, str],
    *,
    missing: Sequence[str] = (),
    parts: Path | None = None,
) -> None:
    """Write the page; texts are escaped, figures embedded, and a policy forbids the browser to load anything else.

    Args:
        table: comes first, without a heading.
        sections: come below it, in this order.
        missing: a line on each thing that the page does not show, with the reason.
        parts: a folder beside the page for each table as Markdown, LaTeX and CSV and each figure as SVG, PDF and PNG,
            to which the page then links; none are written if None.

    Raises:
        UserError: a file cannot be written.
    """
    package = files("advalign.report")
    template = Environment(autoescape=True, trim_blocks=True).from_string((package / "page.html.j2").read_text())
    blocks = []
    for section in (*([TableSection("", table)] if table else []), *sections):
        name = re.sub(r"[^a-z0-9]+", "-", (section.heading or "table").lower()).strip("-")
        links = {}
        if parts is not None:
            for ending, content in _files(section, name).items():
                write_atomically(parts / f"{name}.{ending}", content)
                links[ending] = f"{parts.relative_to(path.parent).as_posix()}/{name}.{ending}"
        figure = _embedded(section, name) if isinstance(section, FigureSection) else ""
        blocks.append({"section": section, "figure": figure, "links": links})
    style, script = (Markup((package / name).read_text()) for name in ("page.css", "sort.js"))
    write_atomically(
        path,
        template.render(
            title=title, introduction=introduction, blocks=blocks, missing=missing, environment=environment,
            style=style, script=script,
        ),
    )  # fmt: skip


def _files(section: Section, name: str) -> dict[str, str | bytes]:
    """Return the files of a section by their ending."""
    if isinstance(section, TableSection):
        table = section.table
        return {"md": table.markdown() + "\n", "tex": table.latex() + "\n", "csv": table.csv()}
    if isinstance(section, FigureSection):
        pdf = drawn(section.figure, "pdf", metadata={"CreationDate": None})
        return {"svg": svg(section.figure, name), "pdf": pdf, "png": png(section.figure)}
    return {}


def _embedded(section: FigureSection, name: str) -> Markup:
    """Return a figure of lines as SVG, which shows texts under the pointer, and one of images as PNG."""
    if any(axes.images for axes in section.figure.axes):
        return Markup('<img src="{}" alt="{}">').format(data_uri(section.figure), section.alt or section.caption)
    return Markup(inline(section.figure, name))
