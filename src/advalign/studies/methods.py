"""All methods on digits: every base, every plug-in on one of them and six on five, at the size of the demo."""

from __future__ import annotations

from advalign.objectives import BASES, PLUGINS
from advalign.studies.cells import Cell, Column
from advalign.studies.demo import MODEL, demo_columns
from advalign.studies.scales import Scale
from advalign.studies.study import Study
from advalign.training.recipes import digits

_JOINED_BASES = ("at", "alp", "trades", "mart", "hat")
_JOINING_PLUGINS = ("kd", "bgat", "lbgat", "vfd", "ar-at", "afa")
_HOMES = {"qub": "at", "igdm": "ard", "adaad": "ard"}
"""The bases of plug-ins that do not join TRADES, or were made for another."""
EVERY_METHOD = (
    *BASES,
    *(f"{base}+{plugin}" for base in _JOINED_BASES for plugin in _JOINING_PLUGINS),
    *(f"{_HOMES.get(plugin, 'trades')}+{plugin}" for plugin in PLUGINS if plugin not in _JOINING_PLUGINS),
)


def methods_study(scale: Scale) -> Study:
    """Every base and plug-in on scikit-learn's digits, AutoAttack last; the same at every scale."""
    return Study(
        name="methods",
        title="All methods on digits",
        cells=tuple(Cell(method=method, data="digits", model=MODEL, recipe=digits()) for method in EVERY_METHOD),
        columns=(*demo_columns(), Column(heading="AutoAttack", attack="autoattack")),
        seeds=5,
        one_thread=True,
    )
