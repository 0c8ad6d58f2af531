"""A frontier in words: what was chosen, what it gains and costs, what to try, and what looks like masked gradients."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from torch import Tensor

from advalign.evaluation.compare import Difference
from advalign.frontier.evidence import CLEAN
from advalign.frontier.result import StoredFrontier
from advalign.frontier.trace import ON_ACCURATE, ON_ROBUST, Curve, Point

NOTABLE = 2.0
"""Points above which examples from elsewhere, or a distance from the floor, are a sign of masked gradients."""
_COMPLEMENTARY = 3.0  # points below which mixing cannot pay
_TWO_PASSES = ("mix", "mixednuts")
_HARDLY_ROBUST = 1.0
_FIRST_END = {"soup": "second robust network", "finetune": "tuned network"}
"""What the network at the first setting is, where it is not an accurate one."""
_LISTED = 3


class BySource(NamedTuple):
    """What a setting classifies correctly, (N,) bool, after the examples made on each kind of network; None of none."""

    own: Tensor | None = None
    """Of a setting that is one of the two networks, the examples made on that."""
    robust: Tensor | None = None
    accurate: Tensor | None = None
    others: Tensor | None = None


def by_source(point: Point, curve: Curve) -> BySource:
    """Return what is left at a setting after its own attack, and after those on the two networks and on others."""
    robust, accurate = str(curve.points[-1].setting), str(curve.points[0].setting)
    kinds = {accurate: "accurate", robust: "robust", str(point.setting): "own"}
    left: dict[str, Tensor] = {}
    for name, right in point.by_source.items():
        if name == CLEAN:
            continue
        setting = name.rpartition(" on ")[2]
        for network, end in ((ON_ROBUST, robust), (ON_ACCURATE, accurate)):
            setting = end if setting.startswith(network) else setting  # its other forms as well
        kind = kinds.get(setting, "others")
        left[kind] = left.get(kind, point.clean) & right
    return BySource(**left)


def only_elsewhere(point: Point, curve: Curve) -> Tensor:
    """Return (N,) bool: images that withstand the attack on the setting itself, and not examples made elsewhere."""
    own = by_source(point, curve).own
    return (point.clean if own is None else own) & ~point.robust


def percent(right: Tensor) -> float:
    """Return the share of images, in per cent."""
    return 100 * float(right.double().mean())


def summary(stored: StoredFrontier) -> list[str]:
    """Say what the two networks reach, what was chosen, what it gains and costs, and whether that could be more."""
    content, test = stored.content, stored.test
    accurate, robust = test.points[0], test.points[-1]
    first = _FIRST_END.get(content["method"], "accurate network")
    images = f"{test.images} test images of {content['data']}, {content['threat']}"
    lines = [
        f"On {images}: the {first}, {content['accurate']['method']}, has {_accuracies(accurate)}; the robust "
        f"one, {content['robust']['method']}, {_accuracies(robust)}."
    ]
    lines += _nothing_gained(stored) if stored.chosen == len(test.points) - 1 else _gain(stored)
    if content["method"] in _TWO_PASSES:
        lines.append(_complementarity(stored))
    return lines


def _accuracies(point: Point) -> str:
    return f"{percent(point.clean):.1f} % clean and {percent(point.robust):.1f} % robust accuracy"


def _gain(stored: StoredFrontier) -> list[str]:
    """Say what the chosen setting gains and costs on the test images, at inference, and beside the held-out images."""
    chosen, robust = stored.test.points[stored.chosen], stored.test.points[-1]
    passes = "two forward passes, one of each network" if stored.content["method"] in _TWO_PASSES else (
        "one forward pass, as before"
    )  # fmt: skip
    held_out = stored.held_out.points[stored.chosen], stored.held_out.points[-1]
    there = " and ".join(f"{_points(a, b):+.1f} points {what}" for what, a, b in _both(*held_out))
    here = " and ".join(f"{_points(a, b):+.1f}" for _, a, b in _both(chosen, robust))
    gains = _difference(robust.clean, chosen.clean)
    unsure = " So many images do not tell whether it is more accurate." if gains.p_value >= 0.05 else ""
    if gains.second <= gains.first:
        unsure = " It gains nothing there: keep the robust network, or choose on more images."
    return [
        f"Chosen: {chosen.setting}. It has {_accuracies(chosen)}: {_with_interval(gains)} points clean, "
        f"{_with_interval(_difference(robust.robust, chosen.robust))} points robust against the robust network (95 % "
        f"intervals, on the same images).{unsure} An image costs {passes}.",
        f"It was chosen on {stored.content['images_held_out']}, where the difference is {there}; on the test images it "
        f"is {here}.",
    ]


def _nothing_gained(stored: StoredFrontier) -> list[str]:
    """Say why the robust network itself was chosen, and what to try."""
    curve, give = stored.held_out, stored.content["give"]
    robust = curve.points[-1]
    better = [point for point in curve.points[:-1] if point.count.clean > robust.count.clean]
    where = f"on {stored.content['images_held_out']}"
    if not better:
        return [
            f"The robust network itself was chosen: {where}, no setting is more accurate. Try a more accurate network."
        ]
    nearest = max(better, key=lambda point: (point.count.robust, point.count.clean))
    loss = _points(robust.robust, nearest.robust)
    return [
        f"The robust network itself was chosen: {where}, every more accurate setting loses more of the robust "
        f"accuracy than --give {give:g} allows. Least is lost at {nearest.setting}: {loss:.1f} points, for "
        f"{_points(nearest.clean, robust.clean):+.1f} points of clean accuracy; one image is "
        f"{100 / curve.images:.2g} points. Try --give {ceil(10 * loss - 1e-6) / 10:g}, which admits it, or a more "
        "accurate network."
    ]


def _complementarity(stored: StoredFrontier) -> str:
    share = percent(stored.test.points[0].clean & ~stored.test.points[-1].clean)
    line = (
        f"The accurate network has {share:.1f} % of the test images right that the robust one has wrong; clean "
        "accuracy can hardly gain more."
    )
    if share < _COMPLEMENTARY:
        line += f" Below {_COMPLEMENTARY:g} %, mixing the two cannot pay: it needs a more accurate network."
    return line


def _both(first: Point, second: Point) -> list[tuple[str, Tensor, Tensor]]:
    return [("clean", first.clean, second.clean), ("robust", first.robust, second.robust)]


def _points(first: Tensor, second: Tensor) -> float:
    return percent(first) - percent(second)


def _difference(first: Tensor, second: Tensor) -> Difference:
    """Return how the second differs from the first, image by image."""
    before, after = percent(first) / 100, percent(second) / 100
    return Difference("", before, after, int((first & ~second).sum()), int((second & ~first).sum()), len(first))


def _with_interval(difference: Difference) -> str:
    low, high = (100 * bound for bound in difference.interval)
    return f"{100 * (difference.second - difference.first):+.1f} [{low:+.1f}, {high:+.1f}]"


def alarms(stored: StoredFrontier) -> list[str]:
    """Say where the attacks may have failed, and what that means; one line says so where nothing points to it."""
    curve = stored.test
    elsewhere = {str(p.setting): percent(only_elsewhere(p, curve)) for p in curve.points}
    lines = []
    if missed := {name: share for name, share in elsewhere.items() if share > NOTABLE}:
        lines.append(
            f"Masked gradients? {_listed(missed)}: so many points withstand the attack on the setting itself and are "
            "lost to examples made on other networks: that attack is too weak, or part of the gradient is hidden from "
            "it. All examples count in the numbers here, but there may be more that nobody found: "
            f"{'rely on the floor, or ' if curve.points[-1].floor is not None else ''}"
            "repeat this with a stronger --curve-attack."
        )
    if int(curve.points[0].robust.sum()) > int(curve.points[-1].robust.sum()):
        lines.append("The network named first withstands less than the other: name the robust one first.")
    above = _above_floor(curve)
    if far := {name: gap for name, gap in above.items() if gap > NOTABLE}:
        lines.append(
            f"Far from the floor: {_listed(far)}. So many points lie between the floor and the robust accuracy found, "
            "although the accurate network alone withstands hardly anything. Either it cannot do the worst that the "
            "floor allows for (at a temperature above 1 it is too unsure), or it hides the gradient, and a stronger "
            "attack would come nearer to the floor. Only the floor does not depend on the accurate network."
        )
    if not lines:
        worst = max(elsewhere.values())
        lines.append(
            f"No sign of masked gradients: examples made on other networks take at most {worst:.1f} points that the "
            "attack on a setting itself leaves."
            + (
                ""
                if above
                else " The distance from the floor was not judged: there is no floor here, or the accurate "
                "network withstands attacks itself."
            )
        )
    return lines


def _above_floor(curve: Curve) -> dict[str, float]:
    """Return how far each mix lies above its floor, if the accurate network alone withstands hardly anything."""
    if percent(curve.points[0].robust) > _HARDLY_ROBUST:
        return {}
    between = curve.points[1:-1]
    return {str(each.setting): _points(each.robust, each.floor) for each in between if each.floor is not None}


def _listed(numbers: dict[str, float]) -> str:
    shown = [f"{name} ({number:.1f})" for name, number in numbers.items()]
    further = [f"{len(shown) - _LISTED} more"] if len(shown) > _LISTED else []
    return "; ".join((*shown[:_LISTED], *further))
