"""Two models on the same images: which is better, and whether there are enough images to say so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from advalign.attacks.names import parse_name, worst_cases_among
from advalign.errors import UserError, require, unknown
from advalign.runs.formats import ResultFile, read_checked_json
from advalign.runs.run import data_kind
from advalign.runtime.files import digest_of_file, require_original
from advalign.runtime.near import near_path

# What two outcomes must share to be comparable image by image.
_SAME = ("data", "images", "threat", "n", "attack_seed", "precision", "batch_size")
_NORMAL = 1.959964  # the standard normal's 97.5 % quantile


@dataclass(frozen=True)
class Difference:
    """Two models' outcomes on the same n images under one attack."""

    attack: str
    first: float
    """Accuracy of the first model, in [0, 1]."""
    second: float
    only_first: int
    """Images that only the first model classifies correctly."""
    only_second: int
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % confidence interval of second - first, which excludes 0 if and only if the p-value is below 0.05.

        It holds the differences that Tango's score test for paired proportions (1998) does not reject; 0 is decided by
        McNemar's exact test instead, which is the more cautious of the two.
        """
        from scipy.optimize import brentq

        low, high = (float(brentq(self._score, self._off_gap(end), end)) for end in (-1.0, 1.0))  # pyright: ignore[reportArgumentType]
        return (low, high) if self.p_value < 0.05 else (min(low, 0.0), max(high, 0.0))

    @property
    def p_value(self) -> float:
        """The exact two-sided p-value of McNemar's test that both models are equally accurate."""
        from scipy.stats import binomtest

        differ = self.only_first + self.only_second
        return float(binomtest(self.only_first, differ).pvalue) if differ else 1.0

    @property
    def _gap(self) -> float:
        return (self.only_second - self.only_first) / self.n

    def _off_gap(self, end: float) -> float:
        """Return a point just beside the gap, since at the gap itself the score is 0 if the models never differ."""
        return self._gap + 1e-9 * (end - self._gap)

    def _score(self, gap: float) -> float:
        """Return how clearly the score test rejects a difference: negative inside the interval, 0 at its ends."""
        b, c, n = self.only_second, self.only_first, self.n
        # The likeliest share of images that only the first classifies correctly, if the difference is `gap`.
        linear = -b - c + (2 * n - b + c) * gap
        share = (max(linear**2 + 8 * n * c * gap * (1 - gap), 0.0) ** 0.5 - linear) / (4 * n)
        return n * (self._gap - gap) ** 2 - _NORMAL**2 * (2 * share + gap * (1 - gap))


class Comparison(NamedTuple):
    """Two models' differences under every attack that both were evaluated with, the worst case last."""

    first: str
    """The first model's source, and its checkpoint."""
    second: str
    differences: list[Difference]
    worst: str
    """The worst case by its name; empty if the two have none in common."""
    unreadable: list[str]
    """A line on each result file that could not be read, with the reason."""


class _Key(NamedTuple):
    worst: bool
    attack: str
    setting: tuple[Any, ...]


class _Outcome(NamedTuple):
    images: str  # a digit an image, 1 where it is classified correctly
    checkpoint: str
    file: Path


def compare(first: str | Path, second: str | Path, checkpoint: str = "best") -> Comparison:
    """Compare two models under every attack that both were evaluated with on the same images.

    If there are such evaluations on several numbers of images, the largest number counts.

    Args:
        first, second: run folders, or result files (`.json`) of `advalign evaluate`.
        checkpoint: `best` or `last`, of run folders; a result file holds its own.

    Raises:
        UserError: no such folder or file, no common evaluation, or several with different answers.
    """
    if checkpoint not in ("best", "last"):
        raise unknown("checkpoint", checkpoint, ("best", "last"))
    unreadable: list[str] = []
    ours, theirs = (_outcomes(Path(source), checkpoint, unreadable) for source in (first, second))
    common = _comparable([key for key in ours if key in theirs], f"{first} and {second}")
    a, b = ([_only(outcomes[key], key.attack) for key in common] for outcomes in (ours, theirs))
    names = ["worst case" if key.worst else key.attack for key in common]
    differences = [_difference(name, x.images, y.images) for name, x, y in zip(names, a, b, strict=True)]
    worst = next((key.attack for key in common if key.worst), "")
    sources = f"{first} ({a[0].checkpoint})", f"{second} ({b[0].checkpoint})"
    return Comparison(*sources, differences, worst, list(dict.fromkeys(unreadable)))


def _difference(attack: str, first: str, second: str) -> Difference:
    pairs = list(zip(first, second, strict=True))
    n = len(pairs)
    return Difference(
        attack, first.count("1") / n, second.count("1") / n, pairs.count(("1", "0")), pairs.count(("0", "1")), n
    )


def _comparable(common: list[_Key], sources: str) -> list[_Key]:
    """Return the keys of the setting with most images; of the worst cases only that over most attacks, last."""
    require(
        bool(common),
        lambda: (
            f"{sources} have no evaluation in common: evaluate both with the same attacks, data, threat, -n, --seed, "
            "--precision and --batch-size"
        ),
    )
    settings = [dict(zip(_SAME, key.setting, strict=True)) for key in common]
    most = max(setting["n"] for setting in settings)
    settings = [setting for setting in settings if setting["n"] == most]
    for name in _SAME:
        values = list(dict.fromkeys(str(setting[name]) for setting in settings))
        require(
            len(values) == 1,
            lambda: (
                f"{sources} have evaluations in common with {name} {' and '.join(values)}: "
                f"name two result files instead"
            ),
        )
    common = [key for key in common if dict(zip(_SAME, key.setting, strict=True)) in settings]
    worst = worst_cases_among(key.attack for key in common if key.worst)[:1]
    return [*(key for key in common if not key.worst), *(key for key in common if key.worst and key.attack in worst)]


def _only(outcomes: list[_Outcome], attack: str) -> _Outcome:
    """Return the outcome that all of a model's results agree on."""
    first, *others = outcomes
    for other in others:
        require(
            other.images == first.images,
            lambda: f"{first.file} and {other.file} differ in {attack}: name one of them instead of the folder",
        )
    return first


def _outcomes(source: Path, checkpoint: str, unreadable: list[str]) -> dict[_Key, list[_Outcome]]:
    """Return the outcomes in a result file, or in those of a run folder."""
    outcomes: dict[_Key, list[_Outcome]] = {}
    for file, content in _results(source, checkpoint, unreadable).items():
        first, last = content["records"][0], content["records"][-1]
        first = {**first, "data": data_kind(first["data"])}  # the images are told by their digest, wherever they lie
        setting = tuple(first[key] for key in _SAME)
        for attack, images in content["outcomes"].items():
            outcomes.setdefault(_Key(False, attack, setting), []).append(_Outcome(images, first["checkpoint"], file))
        name = parse_name(last["attack"])
        if name.is_worst_case and content["outcomes"].keys() >= {*name.members}:
            columns = zip(*(content["outcomes"][each] for each in ("clean", *name.members)), strict=True)
            worst = _Outcome("".join(map(min, columns)), first["checkpoint"], file)
            outcomes.setdefault(_Key(True, last["attack"], setting), []).append(worst)
    return outcomes


def _hint(source: Path) -> str:
    """Return what to name in the place of MODEL@FILE, which is a network and no evaluation; else a similar path."""
    model, at, file = str(source).partition("@")
    if model and at and Path(file).is_file():
        return f": evaluate it first, and name the .json file that is written, evaluations/{Path(file).stem}-...json"
    return near_path(source)


def _results(source: Path, checkpoint: str, unreadable: list[str]) -> dict[Path, Any]:
    """Read a result file, or those of a run folder that are of the checkpoint's present weights.

    Raises:
        UserError: there are none that can be read.
    """
    if source.is_file():
        return {source: _read_result(source)}
    require(source.is_dir(), lambda: f"no run folder or result file {str(source)!r}{_hint(source)}")
    every, seen, files = {}, dict[str, Path](), sorted((source / "evaluations").glob("*.json"))
    for file in (file for file in files if not file.name.endswith(".robustbench.json")):
        try:
            content = _read_result(file)
            require_original(file, seen, "remove both, and evaluate again")
            every[file] = content
        except UserError as error:
            unreadable.append(f"Not read: {error}.")
    reasons = "".join(f" {line}" for line in unreadable[:1])
    loose = next((each for each in sorted(source.glob("*.json")) if each.with_suffix(".md").exists()), None)
    require(
        bool(every) or loose is None, lambda: f"{str(source)!r} is no run folder: name a file in it, such as {loose}"
    )
    require(bool(every), lambda: f"no evaluations in {str(source)!r}: run advalign evaluate first.{reasons}")
    weights = source / f"{checkpoint}.safetensors"
    now = digest_of_file(weights) if weights.exists() else ""
    results = {
        file: content
        for file, content in every.items()
        if content["records"][0]["checkpoint"] == checkpoint and (not now or content.get("weights", now) == now)
    }
    evaluated = ", ".join(sorted({content["records"][0]["checkpoint"] for content in every.values()}))
    require(
        bool(results),
        lambda: (
            f"no evaluation in {str(source)!r} is of checkpoint {checkpoint} as it is now, but of {evaluated}: "
            "run advalign evaluate, or name a result file"
        ),
    )
    return results


def _read_result(file: Path) -> dict[str, Any]:
    return read_checked_json(file, ResultFile, "evaluate again")
