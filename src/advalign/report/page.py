"""One self-contained HTML page: tables and figures in a single file that opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment
from matplotlib.figure import Figure

from advalign.report.figures import data_uri
from advalign.report.tables import Table
from advalign.runs.files import write_atomically


class Plate(NamedTuple):
    """A figure with its heading and caption."""

    heading: str
    figure: Figure
    caption: str


def write_page(
    path: Path,
    title: str,
    introduction: Sequence[str],
    table: Table,
    plates: Sequence[Plate],
    environment: Mapping[str, str],
) -> None:
    """Write the page; texts are escaped, figures embedded.

    Raises:
        UserError: the file cannot be written.
    """
    template = Environment(autoescape=True).from_string((files("advalign.report") / "page.html.j2").read_text())
    figures = [(plate.heading, data_uri(plate.figure), plate.caption) for plate in plates]
    write_atomically(
        path,
        template.render(title=title, introduction=introduction, table=table, figures=figures, environment=environment),
    )
