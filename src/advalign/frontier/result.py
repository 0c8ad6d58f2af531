"""A frontier as a value and as a file: the points, the choice, and what each attack took."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from advalign.frontier.dial import Dial
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
    run: Run
    """The chosen network as a run."""
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
        "run": frontier.run.id,
        "environment": environment(),
    }
    write_checked_json(frontier.path / FILE, content)


def read_frontier(path: Path) -> dict[str, Any]:
    """Read a `frontier.json`, as `FrontierFile` describes it.

    Raises:
        UserError: it is missing, damaged, or something else.
    """
    return read_checked_json(path, FrontierFile, "make the frontier again")


def _outcomes(point: Point) -> dict[str, Any]:
    floor = {} if point.floor is None else {"floor": _digits(point.floor)}
    sources = {name: _digits(right) for name, right in point.by_source.items()}
    return {"robust": _digits(point.robust), **floor, "sources": sources}


def _digits(right: Tensor) -> str:
    return "".join(map(str, right.int().tolist()))
