"""Published robust models by name: the architecture that a file of RobustBench's fits, and the numbers that it had.

The table, `zoo.json`, has names, layouts and published numbers; no weights, and no program of theirs, are in here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from advalign.errors import unknown

PREFIX = "zoo:"


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A published model of RobustBench's leaderboards."""

    key: str
    """RobustBench's name; with `l2/` or `cifar100/` before it on those leaderboards."""
    data: str
    norm: str
    eps: float
    model: str
    """The spelling of its architecture, with its normalisation of images."""
    clean: float
    """Published clean accuracy, %."""
    autoattack: float
    """Published accuracy under AutoAttack in its threat model, %."""
    paper: str
    link: str
    authors: str
    venue: str
    additional_data: bool
    architecture: str

    def card(self) -> dict[str, Any]:
        """Return what is known of its weights, in the place of a card in their file."""
        return {
            "method": self.key,
            "model": self.model,
            "data": self.data,
            "norm": self.norm,
            "eps": self.eps,
            "classes": 100 if self.data == "cifar100" else 10,
            "channels": 3,
            "zoo": self.key,
        }


@cache
def zoo() -> dict[str, ZooModel]:
    """Return all published models that can be named, by key."""
    table = json.loads((files("advalign.runs") / "zoo.json").read_text())
    return {row["key"]: ZooModel(**row) for row in table}


def zoo_model(key: str) -> ZooModel:
    """Return a published model by its key.

    Raises:
        UserError: there is none; the nearest key.
    """
    if key not in zoo():
        raise unknown("zoo model", key, zoo())
    return zoo()[key]
