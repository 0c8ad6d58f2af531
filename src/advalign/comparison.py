"""Models on the same images: which is better, whether the images are enough to say so, and what transfers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from advalign.errors import UserError, require
from advalign.measure import measure
from advalign.report.tables import Table
from advalign.runs.files import read_json

# What two outcomes must share, or an image's two answers would be to two questions.
_SAME = ("data", "images", "threat", "n", "attack_seed", "precision")


@dataclass(frozen=True)
class Difference:
    """Two models' outcomes on the same n images under one attack."""

    attack: str
    first: float
    """Accuracy of the first model, in [0, 1]."""
    second: float
    only_first: int
    """Images that only the first model gets right."""
    only_second: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of second - first, for paired outcomes (Wald, as in Agresti 2002, 10.1.1)."""
        gap = (self.only_second - self.only_first) / self.n
        variance = (self.only_first + self.only_second) / self.n - gap**2
        half = 1.96 * sqrt(max(variance, 0.0) / self.n)
        return gap - half, gap + half

    @property
    def p_value(self) -> float:
        """The exact two-sided p-value of McNemar's test: that the images they differ on fall as a coin would."""
        from scipy.stats import binomtest

        differ = self.only_first + self.only_second
        return float(binomtest(self.only_first, differ).pvalue) if differ else 1.0


def compare(first: str | Path, second: str | Path) -> list[Difference]:
    """Compare two models under every attack that both were evaluated with on the same images.

    Args:
        first, second: run folders, or result files (`.json`) of `advalign evaluate`.

    Raises:
        UserError: no such folder or file, or no common evaluation.
    """
    ours, theirs = _outcomes(Path(first)), _outcomes(Path(second))
    common = [key for key in ours if key in theirs]
    require(
        bool(common),
        f"{first} and {second} have no evaluation in common: evaluate both with the same attacks, data, threat and -n",
    )
    return [_difference(key[0], ours[key], theirs[key]) for key in common]


def transfer_matrix(sources: Sequence[str | Path], attack: str, **options: Any) -> Table:
    """Show every model the adversarial images that were made on every other; a row for each surrogate.

    Args:
        sources: run folders or weights files of models for the same data and threat.
        attack: a spelling; it goes on to its last step.
        options: as `measure` takes them, `n` and `eps` among them.

    Raises:
        UserError: fewer than two sources, or as `measure`.
    """
    require(len(sources) > 1, "name at least two models to transfer between")
    names = [Path(source).name for source in sources]
    found = [[measure(target, [attack], surrogate=one, **options) for target in sources] for one in sources]
    shares = [[f"{100 * each.records[1].accuracy:.1f}" for each in line] for line in found]
    rows = [(name, *line) for name, line in zip(names, shares, strict=True)]
    clean = ("(clean images)", *(f"{100 * each.records[0].accuracy:.1f}" for each in found[0]))
    first = found[0][0].records[0]
    caption = (
        f"Accuracy in % of each column's model on images made by {attack}, to the last step, on each row's; "
        f"threat: {first.threat}; data: {first.data}; test images: {first.n}."
    )
    return Table(("made on", *names), (*rows, clean), frozenset(), caption)


def comparison_table(differences: Sequence[Difference], first: str, second: str) -> Table:
    """Tabulate differences in points, each with its interval and p-value."""
    rows = []
    for d in differences:
        low, high = (100 * bound for bound in d.interval)
        gap = f"{100 * (d.second - d.first):+.1f} [{low:+.1f}, {high:+.1f}]"
        split = f"{d.only_first} / {d.only_second}"
        rows.append((d.attack, f"{100 * d.first:.1f}", f"{100 * d.second:.1f}", gap, split, f"{d.p_value:.2g}"))
    caption = (
        f"A: {first}; B: {second}; accuracy in % on the same {differences[0].n} test images. B - A in points with its "
        "95 % confidence interval for paired outcomes; images that A alone and B alone gets right; p of McNemar's "
        "exact test. It speaks of these two trained models and the choice of test images, not of another training seed."
    )
    return Table(("attack", "A", "B", "B - A", "only A / only B", "p"), tuple(rows), frozenset(), caption)


def _difference(attack: str, first: str, second: str) -> Difference:
    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    return Difference(
        attack, first.count("1") / n, second.count("1") / n, pairs.count(("1", "0")), pairs.count(("0", "1")), n
    )


def _outcomes(source: Path) -> dict[tuple[Any, ...], str]:
    """Return each outcome, a digit an image, by attack and what it was measured on."""
    files = [source] if source.is_file() else sorted((source / "evaluations").glob("*.json"))
    require(bool(files), f"no evaluations in {str(source)!r}: run advalign evaluate first")
    found: dict[tuple[Any, ...], str] = {}
    for file in files:
        content = read_json(file)
        try:
            first = content["records"][0]
            for attack, outcome in content["outcomes"].items():
                found[attack, *(first[key] for key in _SAME)] = outcome
        except (KeyError, IndexError, TypeError, AttributeError):
            raise UserError(f"{file} is no result of advalign evaluate") from None
    return found
