"""What all figures share: style, colours, marks that show a text under the pointer, names letter by letter, and PNG.

An artist whose gid begins with `HOVER` shows what follows when the pointer is on it, in the SVG of `report.svg`.
"""

from __future__ import annotations

import base64
import io
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogFormatter

HOVER = "hover: "
FEW_CURVES = 10
"""Up to this many curves, a legend inside the axes and matplotlib's own colours are enough."""
MOST_NAMES = 60
"""So many models are named in a figure; of more, the names are read off under the pointer, or in a table."""
MARKERS = "osD^vP*X"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


def curves_figure(width: float, height: float, *, named: bool) -> Figure:
    """Return a figure for curves, in STYLE; one without names beside its axes needs no layout, which takes seconds."""
    if named:
        return Figure(figsize=(width, height), layout="constrained")
    figure = Figure(figsize=(width, height))
    figure.subplots_adjust(left=0.09, right=0.98, bottom=0.15, top=0.9, wspace=0.25)
    return figure


def color_of(i: int, n: int) -> Any:
    """Return the colour of curve i of n; every curve has another."""
    return f"C{i}" if n <= FEW_CURVES else mpl.colormaps["turbo"]((i + 0.5) / n)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG."""
    return drawn(figure, "png", dpi=150)


def drawn(figure: Figure, ending: str, **options: Any) -> bytes:
    """Return the figure as a file of an ending: `png`, `pdf` or `svg`.

    Names of classes and runs are shown letter by letter, without mathematics between dollars. A letter that no font
    here has is written as its escape, but for SVG, which is drawn elsewhere.
    """
    buffer = io.BytesIO()
    with _literal(figure, escaped=ending != "svg"), warnings.catch_warnings():
        if ending == "svg":
            warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.savefig(buffer, format=ending, **options)
    figure.set_layout_engine("none")  # what was found stays: to find it again for each file takes as long as to draw
    return buffer.getvalue()


@contextmanager
def _literal(figure: Figure, *, escaped: bool) -> Iterator[None]:
    """Let a figure's texts stand for themselves; as they were afterwards.

    Args:
        escaped: whether letters without glyph are escaped; letters that no file can hold always are.
    """
    axes = [axis for each in figure.axes for axis in (each.xaxis, each.yaxis)]
    powers = [axis for axis in axes if isinstance(axis.get_major_formatter(), LogFormatter)]
    ours = {label for axis in powers for label in axis.get_ticklabels(which="both")}  # mathematics: powers of ten
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and text not in ours]
    before = [(text, text.get_text(), text.get_fontfamily(), text.get_parse_math()) for text in texts]
    marks = [artist for artist in figure.findobj() if (artist.get_gid() or "").startswith(HOVER)]
    gids = [mark.get_gid() or "" for mark in marks]
    named = [axis for axis in axes if isinstance(axis.get_major_formatter(), FuncFormatter)]
    formatters = [axis.get_major_formatter() for axis in named]
    try:
        for text in texts:
            text.set_parse_math(False)
            if not text.get_text().isascii():
                text.set_fontfamily(list(_families()))
            text.set_text(_shown(text.get_text(), escaped))
        for mark, gid in zip(marks, gids, strict=True):
            mark.set_gid(_shown(gid, escaped))
        for axis, formatter in zip(named, formatters, strict=True):  # which sets the ticks' texts whenever it is drawn
            axis.major.formatter = FuncFormatter(lambda *at, names=formatter: _shown(names(*at), escaped))
        yield
    finally:
        for axis, formatter in zip(named, formatters, strict=True):
            axis.major.formatter = formatter
        for mark, gid in zip(marks, gids, strict=True):
            mark.set_gid(gid)
        for text, content, family, parses in before:
            text.set_text(content)
            text.set_fontfamily(family)
            text.set_parse_math(parses)


def _shown(text: str, escaped: bool) -> str:
    """Return a text with escapes for the letters that cannot be shown."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter.encode("unicode_escape").decode() if _fails(letter, escaped) else letter for letter in text)


def _fails(letter: str, escaped: bool) -> bool:
    if unicodedata.category(letter) in ("Cc", "Cs"):  # control characters and half characters
        return letter != "\n"
    return escaped and not letter.isascii() and ord(letter) not in _glyphs()


# Fonts with letters that matplotlib's own, DejaVu Sans, has not; the first for Chinese and Japanese.
_FALLBACKS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Yu Gothic", "Malgun Gothic",
    "Apple SD Gothic Neo", "Arial Unicode MS", "Noto Sans", "Noto Sans Symbols2",
)  # fmt: skip


@cache
def _families() -> tuple[str, ...]:
    """Return the families of this machine in which a letter is looked up, one after another."""
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(family for family in _FALLBACKS if family in installed))


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points that some family has a glyph for."""
    fonts = (font_manager.get_font(font_manager.findfont(family)) for family in _families())
    return frozenset(code for font in fonts for code in font.get_charmap())


def data_uri(picture: bytes) -> str:
    """Return a PNG inside a URI, for a page that is one file."""
    return "data:image/png;base64," + base64.b64encode(picture).decode()
