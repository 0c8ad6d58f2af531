"""What all figures share: style, colours, marks that show a text under the pointer, and PNG.

An artist whose gid begins with `HOVER` shows what follows when the pointer is on it, in the SVG of `report.svg`.
"""

from __future__ import annotations

import base64
import io
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

HOVER = "hover: "
FEW_CURVES = 10
"""Up to this many curves, a legend inside the axes and matplotlib's own colours are enough."""
MARKERS = "osD^vP*X"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def color_of(i: int, n: int) -> Any:
    """Return the colour of curve i of n; every curve has another."""
    return f"C{i}" if n <= FEW_CURVES else mpl.colormaps["turbo"]((i + 0.5) / n)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def data_uri(figure: Figure) -> str:
    """Return the figure as a PNG inside a URI, for a page that is one file."""
    return "data:image/png;base64," + base64.b64encode(png(figure)).decode()
