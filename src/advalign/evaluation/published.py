"""A published model's clean accuracy beside the one measured here: the test that the network is built as it was."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

from torch import Tensor

from advalign.evaluation.checks import ALPHA
from advalign.evaluation.interval import wilson
from advalign.runs.zoo import zoo_model

_ROUNDING = 0.05
"""Points by which another machine's arithmetic may move an accuracy on 10,000 images."""
_WHOLE = 10_000
_Z = NormalDist().inv_cdf(1 - ALPHA / 2)


def compare_published(card: Mapping[str, Any], data: str, clean: Tensor) -> tuple[str, str]:
    """Return a note that the clean accuracy is the published one, or a warning that it is not; the other is empty.

    On part of the test set it agrees if the published accuracy lies in the 99.9 % interval. A wrong activation, padding
    or normalisation costs more than that, and changes no shape in the file.

    Args:
        card: of the weights; both are empty if it is of no published model, or the data are not those published on.
        clean: (N,) whether each test image is classified correctly.
    """
    if "zoo" not in card or data != card["data"]:
        return "", ""
    expected, right, n = zoo_model(card["zoo"]).clean, int(clean.sum()), len(clean)
    low, high = (100 * bound for bound in wilson(right, n, _Z))
    share = 100 * right / n
    agrees = abs(share - expected) <= _ROUNDING if n == _WHOLE else low <= expected <= high
    measured = f"{share:.2f} % on {n} images" + ("" if n == _WHOLE else f" (99.9 %: {low:.1f} to {high:.1f})")
    if agrees:
        return f"published clean accuracy {expected:.2f} %, measured {measured}: they agree", ""
    return "", (
        f"Clean accuracy is {measured}, but {card['zoo']} was published with {expected:.2f} %: this is another file, "
        "or its layout, activation or normalisation is another, and no number here is the published model's."
    )
