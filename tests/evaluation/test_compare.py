"""Two models on the same images: counts by hand, McNemar against a coin, intervals against a simulation."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.samples import RECORD

from advalign.errors import UserError
from advalign.evaluation.compare import Comparison, Difference, compare
from advalign.report.comparison import comparison_table
from advalign.runs.formats import write_checked_json
from advalign.runtime.files import digest_of_file

SETTING = {
    "data": "digits", "images": "abc", "threat": "Linf(0.2)", "n": 6, "attack_seed": 0, "precision": "fp32",
    "batch_size": 512, "checkpoint": "best",
}  # fmt: skip


def result(
    folder: Path, name: str, outcomes: dict[str, str], file: str = "best", weights: str | None = None, **changes: Any
) -> Path:
    path = folder / name / "evaluations" / f"{file}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    bounded = [attack for attack in outcomes if attack not in ("clean", "cw(steps=9)")]
    attacks = [*outcomes, *([f"worst({', '.join(bounded)})"] if bounded else [])]
    records = []
    for attack in attacks:
        columns = zip(*(outcomes[each] for each in ("clean", *bounded)), strict=True)
        digits = outcomes.get(attack) or "".join(map(min, columns))
        accuracy = digits.count("1") / len(digits)
        setting = {**asdict(RECORD), **SETTING, "n": len(digits), **changes}
        records.append({**setting, "attack": attack, "accuracy": accuracy})
    own = {} if weights is None else {"weights": weights}
    write_checked_json(path, {"records": records, "outcomes": outcomes, "environment": {}, **own})
    return folder / name


def test_counts_by_hand(tmp_path: Path):
    a = result(tmp_path, "a", {"clean": "111110", "fgsm": "110000"})
    b = result(tmp_path, "b", {"clean": "111101", "fgsm": "101110", "mim": "000000"})
    found = compare(a, b)
    clean, fgsm = found.differences
    assert clean == Difference("clean", 5 / 6, 5 / 6, 1, 1, 6)
    assert fgsm == Difference("fgsm", 2 / 6, 4 / 6, 1, 3, 6)
    assert compare(a / "evaluations" / "best.json", b).differences == [clean, fgsm]
    table = comparison_table(found)
    assert f"A: {a} (best); B: {b} (best)" in table.caption
    assert table.rows[1][:3] == ("fgsm", "33.3", "66.7")
    assert table.rows[1][4] == "1 / 3"


@pytest.mark.parametrize(("first", "second"), [(1, 3), (0, 5), (7, 7), (30, 12), (0, 0)])
def test_mcnemar_is_a_coins_tail(first: int, second: int):
    p = Difference("clean", 0.5, 0.5, first, second, 100).p_value
    differ, fewer = first + second, min(first, second)
    tail = sum(comb(differ, k) for k in range(fewer + 1)) / 2**differ
    assert p == pytest.approx(min(1.0, 2 * tail))


def test_the_interval_is_the_published_one():
    """Tango's interval on the example of Fagerland, Lydersen and Laake 2014 (airway hyper-responsiveness, n = 21)."""
    difference = Difference("clean", 0, 0, 7, 1, 21)
    assert difference.p_value == pytest.approx(18 / 256)
    low, high = difference.interval
    assert low == pytest.approx(-0.517, abs=5e-4)
    assert high == 0  # the score test rejects 0, its interval ends at -0.026; the exact test does not


@pytest.mark.parametrize("n", [50, 1000])
def test_models_that_never_differ_may_still_differ_elsewhere(n: int):
    """By hand: the score is n d / sqrt(n d (1 - d)), so that d = z^2 / (n + z^2)."""
    bound = 1.959964**2 / (n + 1.959964**2)
    assert Difference("clean", 0, 0, 0, 0, n).interval == pytest.approx((-bound, bound))
    assert Difference("clean", 0, 1, 0, n, n).interval[1] == pytest.approx(1)


@pytest.mark.parametrize("n", [30, *(pytest.param(n, marks=pytest.mark.slow) for n in (100, 500))])
def test_the_interval_and_the_p_value_never_contradict_each_other(n: int):
    for first in range(22):
        for second in range(22):
            difference = Difference("clean", 0, 0, first, second, n)
            low, high = difference.interval
            assert low <= (second - first) / n <= high
            assert (low <= 0 <= high) == (difference.p_value >= 0.05), difference


@pytest.mark.slow
def test_the_interval_covers_the_truth_about_19_times_in_20():
    torch.manual_seed(0)
    n, gap, covered = 400, 0.05, 0
    for _ in range(400):
        draws = torch.rand(n)  # .15 only the first, .20 only the second
        d = Difference("clean", 0, 0, int((draws < 0.15).sum()), int((draws > 0.80).sum()), n)
        covered += d.interval[0] <= gap <= d.interval[1]
    assert 370 <= covered <= 390


@pytest.mark.parametrize(
    "change", [{"images": "other"}, {"n": 5}, {"threat": "L2(0.5)"}, {"attack_seed": 1}, {"batch_size": 9}]
)
def test_different_questions_are_not_compared(tmp_path: Path, change: dict[str, Any]):
    digits = "111110"[: change.get("n", 6)]
    a, b = result(tmp_path, "a", {"clean": "111110"}), result(tmp_path, "b", {"clean": digits}, **change)
    with pytest.raises(UserError, match="no evaluation in common"):
        compare(a, b)


def test_what_is_no_result_is_refused(tmp_path: Path):
    a = result(tmp_path, "a", {"clean": "1"})
    (tmp_path / "odd.json").write_text("[1]")
    with pytest.raises(UserError, match=r"odd\.json is damaged or not of advalign: it is no JSON object"):
        compare(a, tmp_path / "odd.json")
    with pytest.raises(UserError, match=r"no run folder or result file '.*nowhere'"):
        compare(a, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no evaluations in"):
        compare(a, tmp_path / "empty")
    (tmp_path / "several").mkdir()
    for name in ("one.json", "one.md"):
        (tmp_path / "several" / name).write_text("{}")
    with pytest.raises(UserError, match=r"several' is no run folder: name a file in it, such as .*one\.json$"):
        compare(a, tmp_path / "several")
    (tmp_path / "net.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"evaluate it first, and name the \.json file .*evaluations/net-\.\.\.json$"):
        compare(a, f"resnet18@{tmp_path / 'net.pt'}")


def test_the_worst_case_comes_last_where_both_hold_the_same(tmp_path: Path):
    outcomes = {"clean": "111110", "fgsm": "110110", "cw(steps=9)": "000000", "mim": "011110"}
    a = result(tmp_path, "a", outcomes)
    b = result(tmp_path, "b", {**outcomes, "fgsm": "111000", "mim": "111111"})
    found = compare(a, b)
    assert found.worst == "worst(fgsm, mim)"
    assert found.differences[-1] == Difference("worst case", 3 / 6, 3 / 6, 2, 2, 6)  # 010110 and 111000
    assert found.differences[-1].p_value == 1
    assert "Worst case: worst(fgsm, mim)." in comparison_table(found).caption
    c = result(tmp_path, "c", {"clean": "111110", "fgsm": "110110"})
    assert [each.attack for each in compare(a, c).differences] == ["clean", "fgsm"]


def test_the_worst_case_over_most_attacks_counts_and_not_the_longest_name(tmp_path: Path):
    """Transferred examples have long names; 43.2 % withstood them where 13.8 % withstood the white-box attacks."""
    n, white, transferred = 1000, 138, 432
    label = "natural small-cnn(width=16) f4d3f85814"
    for folder in "ab":
        withstood = {"a": 500, "b": 300, "c": white}
        outcomes = {name: "1" * count + "0" * (n - count) for name, count in withstood.items()}
        result(tmp_path, folder, {"clean": "1" * n, **outcomes}, "white", n=n)
        withstood = {f"transfer(fgsm, from {label})": 450, f"transfer(mim, from {label})": transferred}
        outcomes = {name: "1" * count + "0" * (n - count) for name, count in withstood.items()}
        result(tmp_path, folder, {"clean": "1" * n, **outcomes}, "transfer", n=n)
    comparison = compare(tmp_path / "a", tmp_path / "b")
    assert comparison.worst == "worst(a, b, c)"
    worst = comparison.differences[-1]
    assert (worst.attack, worst.first, worst.second) == ("worst case", white / n, white / n)
    assert [each.attack for each in comparison.differences].count("worst case") == 1
    row = comparison_table(comparison).rows[-1]
    assert row[:3] == ("worst case", "13.8", "13.8")


def test_each_checkpoint_is_compared_with_its_own_kind(tmp_path: Path):
    a = result(tmp_path, "a", {"clean": "111110"})
    result(tmp_path, "a", {"clean": "000000"}, "last", checkpoint="last")
    b = result(tmp_path, "b", {"clean": "111110"})
    result(tmp_path, "b", {"clean": "000111"}, "last", checkpoint="last")
    assert compare(a, b).differences == [Difference("clean", 5 / 6, 5 / 6, 0, 0, 6)]
    found = compare(a, b, "last")
    assert found == Comparison(f"{a} (last)", f"{b} (last)", [Difference("clean", 0, 3 / 6, 0, 3, 6)], "", [])
    found = compare(a / "evaluations" / "last.json", b)
    assert (found.first, found.second) == (f"{a / 'evaluations' / 'last.json'} (last)", f"{b} (best)")
    with pytest.raises(UserError, match=r"unknown checkpoint 'lst': did you mean 'last'"):
        compare(a, b, "lst")
    c = result(tmp_path, "c", {"clean": "111110"})
    with pytest.raises(UserError, match=r"no evaluation in .* is of checkpoint last as it is now, but of best"):
        compare(a, c, "last")


def test_several_results_of_one_attack(tmp_path: Path):
    """They serve where they agree, or answer on more images; else one has to be named."""
    a = result(tmp_path, "a", {"clean": "111110"})
    b = result(tmp_path, "b", {"clean": "111110"})
    result(tmp_path, "b", {"clean": "111110"}, "again")
    for folder in "ab":
        result(tmp_path, folder, {"clean": "10"}, "few", n=2)
    assert compare(a, b).differences == [Difference("clean", 5 / 6, 5 / 6, 0, 0, 6)]
    result(tmp_path, "b", {"clean": "111101"}, "other")
    with pytest.raises(UserError, match=r"again\.json and .*other\.json differ in clean: name one of them"):
        compare(a, b)
    assert len(compare(a, b / "evaluations" / "other.json").differences) == 1
    for folder in "ac":
        result(tmp_path, folder, {"clean": "111110"}, "0")
        result(tmp_path, folder, {"clean": "111110"}, "1", attack_seed=1)
    with pytest.raises(UserError, match="have evaluations in common with attack_seed 0 and 1: name two result files"):
        compare(tmp_path / "a", tmp_path / "c")


def test_what_is_no_longer_the_checkpoint_and_other_json_are_left_out(tmp_path: Path):
    a, b = (result(tmp_path, name, {"clean": "000000"}, "old", weights="0" * 16) for name in "ab")
    (a / "best.safetensors").write_bytes(b"new")
    with pytest.raises(UserError, match="as it is now"):
        compare(a, b)
    result(tmp_path, "a", {"clean": "111111"}, weights=digest_of_file(a / "best.safetensors"))
    (a / "evaluations" / "best.robustbench.json").write_text(json.dumps({"name": "at", "eps": "8/255"}))
    assert compare(a, b).differences == [Difference("clean", 1, 0, 6, 0, 6)]


def test_a_copy_of_a_result_is_named_and_counts_once(tmp_path: Path):
    for name in ("a", "b"):
        result(tmp_path, name, {"clean": "1110", "fgsm": "1100" if name == "a" else "1000"})
    file = tmp_path / "b" / "evaluations" / "best.json"
    shutil.copy(file, file.with_name("zzz.json"))
    comparison = compare(tmp_path / "a", tmp_path / "b")
    assert [line for line in comparison.unreadable if "zzz.json is a copy of best.json" in line]
    assert comparison.differences == compare(tmp_path / "a", file).differences
