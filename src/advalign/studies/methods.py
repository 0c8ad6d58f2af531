"""All methods on digits: the bases with and without each plug-in, at the size of the demo."""

from __future__ import annotations

from advalign.studies.cells import Cell
from advalign.studies.demo import MODEL, demo_columns
from advalign.studies.scales import Scale
from advalign.studies.study import Study
from advalign.training.recipes import digits

_JOINED_BASES = ("at", "alp", "trades", "mart", "hat")
_JOINING_PLUGINS = ("kd", "bgat", "lbgat", "vfd", "ar-at", "afa")
# No plug-in joins natural training, which has no adversarial examples; AFA as a base has a clean last layer like it.
EVERY_METHOD = (
    "natural",
    "afa",
    *(base + plugin for base in _JOINED_BASES for plugin in ("", *(f"+{name}" for name in _JOINING_PLUGINS))),
)


def methods_study(scale: Scale) -> Study:
    """Five bases, each plain and with six plug-ins, on scikit-learn's digits; the same at every scale."""
    return Study(
        name="methods",
        title="All methods on digits",
        cells=tuple(Cell(method=method, data="digits", model=MODEL, recipe=digits()) for method in EVERY_METHOD),
        columns=demo_columns(),
        seeds=3,
        one_thread=True,
    )
