"""A frontier as a value and as a file: the points, the choice, and what each attack took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advalign.frontier.dial import Dial, Setting
from advalign.frontier.evidence import CLEAN
from advalign.frontier.trace import Curve, Point
from advalign.runs import Run
from advalign.runs.formats import FrontierFile, read_checked_json, write_checked_json
from advalign.runtime.environment import environment

FILE = "frontier.json"


@dataclass(frozen=True, eq=False, repr=False)
class Frontier:
    """Clean against robust accuracy over the settings between two networks, and the setting that was chosen."""

    dial: Dial
    held_out: Curve
    """On images that neither network was trained on; the choice was made here."""
    test: Curve
    """The same settings on the test images."""
    chosen: int
    """The number of the chosen setting in both curves."""
    run: Run | None
    """The chosen network as a run; None if it was made of networks that were no files."""
    path: Path
    """The folder with `frontier.json`, the page, and the adversarial examples."""
    about: Mapping[str, Any]
    """What the file says of networks, images and attacks."""

    @property
    def network(self) -> nn.Module:
        """The network of the chosen setting, in eval mode: images (N, C, H, W) in [0, 1] to logits (N, K)."""
        return self.dial.network(self.test.points[self.chosen].setting)

    def __repr__(self) -> str:
        point = self.test.points[self.chosen]
        clean, robust = (100 * count / self.test.images for count in point.count)
        return f"Frontier({self.dial.name}, {point.setting}: clean {clean:.1f} %, robust {robust:.1f} %)"


def write_frontier(frontier: Frontier) -> None:
    """Write `frontier.json`.

    Raises:
        UserError: it cannot be written.
    """
    curves = {"held_out": frontier.held_out, "test": frontier.test}
    content = {
        **frontier.about,
        "method": frontier.dial.name,
        "settings": [dict(point.setting.values) for point in frontier.test.points],
        "chosen": frontier.chosen,
        **{name: [_outcomes(point) for point in curve.points] for name, curve in curves.items()},
        "run": "" if frontier.run is None else frontier.run.id,
        "environment": environment(),
    }
    write_checked_json(frontier.path / FILE, content)


@dataclass(frozen=True, eq=False)
class StoredFrontier:
    """A frontier as its file tells it."""

    file: Path
    content: Mapping[str, Any]
    """As `FrontierFile` describes it."""
    held_out: Curve
    test: Curve

    @property
    def chosen(self) -> int:
        """The number of the chosen setting in both curves."""
        return self.content["chosen"]


def read_frontier(path: Path) -> StoredFrontier:
    """Read a `frontier.json`.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    content = read_checked_json(path, FrontierFile, "make the frontier again")
    held_out, test = (_curve(content["settings"], content[images]) for images in ("held_out", "test"))
    return StoredFrontier(path, content, held_out, test)


def _curve(settings: Sequence[Mapping[str, Any]], outcomes: Sequence[Mapping[str, Any]]) -> Curve:
    points = []
    for values, outcome in zip(settings, outcomes, strict=True):
        setting = Setting({name: tuple(each) if isinstance(each, list) else each for name, each in values.items()})
        by_source = {name: _flags(digits) for name, digits in outcome["sources"].items()}
        floor = _flags(outcome["floor"]) if outcome.get("floor") else None
        points.append(Point(setting, by_source[CLEAN], _flags(outcome["robust"]), floor, by_source))
    return Curve(tuple(points), len(points[0].clean))


def _outcomes(point: Point) -> dict[str, Any]:
    floor = {} if point.floor is None else {"floor": _digits(point.floor)}
    sources = {name: _digits(right) for name, right in point.by_source.items()}
    return {"robust": _digits(point.robust), **floor, "sources": sources}


def _digits(right: Tensor) -> str:
    return "".join(map(str, right.int().tolist()))


def _flags(digits: str) -> Tensor:
    return torch.tensor([each == "1" for each in digits])
