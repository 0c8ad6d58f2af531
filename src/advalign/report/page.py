"""One self-contained HTML page of tables and figures that opens offline, and each of them as files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
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
        links, figure = {}, _DrawnOnce(section, name) if isinstance(section, FigureSection) else None
        if parts is not None:
            for ending, content in (_table_files(section) if figure is None else figure.files()).items():
                write_atomically(parts / f"{name}.{ending}", content)
                links[ending] = f"{parts.relative_to(path.parent).as_posix()}/{name}.{ending}"
        blocks.append({"section": section, "figure": figure.embedded() if figure else "", "links": links})
    style, script = (Markup((package / name).read_text()) for name in ("page.css", "sort.js"))
    write_atomically(
        path,
        template.render(
            title=title, introduction=introduction, blocks=blocks, missing=missing, environment=environment,
            style=style, script=script,
        ),
    )  # fmt: skip


def _table_files(section: Section) -> dict[str, str]:
    """Return the files of a table by their ending; a text has none."""
    if not isinstance(section, TableSection):
        return {}
    table = section.table
    return {"md": table.markdown() + "\n", "tex": table.latex() + "\n", "csv": table.csv()}


class _DrawnOnce:
    """A figure's drawings, each made when it is first asked for."""

    def __init__(self, section: FigureSection, name: str) -> None:
        self.section, self.name = section, name

    @cached_property
    def svg(self) -> str:
        return svg(self.section.figure, self.name)

    @cached_property
    def png(self) -> bytes:
        return png(self.section.figure)

    def files(self) -> dict[str, str | bytes]:
        """Return the figure's files by their ending."""
        pdf = drawn(self.section.figure, "pdf", metadata={"CreationDate": None})
        return {"svg": self.svg, "pdf": pdf, "png": self.png}

    def embedded(self) -> Markup:
        """Return a figure of lines as SVG, which shows texts under the pointer, and one of images as PNG."""
        if any(axes.images for axes in self.section.figure.axes):
            alt = self.section.alt or self.section.caption
            return Markup('<img src="{}" alt="{}">').format(data_uri(self.png), alt)
        return Markup(inline(self.svg))
