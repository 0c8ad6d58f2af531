"""Figures as SVG: for files, and inside a page, where pointing at a mark shows what it is."""

from __future__ import annotations

from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure

from advalign.report.figures import HOVER, drawn

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _LINK)


def svg(figure: Figure, name: str) -> str:
    """Return the figure as SVG with its text as text; the same figure gives the same bytes.

    Args:
        name: keeps its definitions apart from those of other figures in one page.
    """
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        root = ElementTree.fromstring(drawn(figure, "svg", metadata={"Date": None}))
    root.remove(root[0])  # metadata: the program and its address
    for group in root.iter(f"{{{_SVG}}}g"):
        gid = group.attrib.pop("id", "")
        if gid.startswith(HOVER):
            title = ElementTree.Element(f"{{{_SVG}}}title")
            title.text = gid.removeprefix(HOVER)
            group.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def inline(text: str) -> str:
    """Return an SVG as an element for HTML, which needs no namespaces, as wide as the page allows."""
    root = ElementTree.fromstring(text)
    root.set("style", f"max-width: {root.attrib.pop('width')}")
    del root.attrib["height"]
    text = ElementTree.tostring(root, encoding="unicode")
    return text.replace(f' xmlns="{_SVG}"', "").replace(f' xmlns:xlink="{_LINK}"', "")
