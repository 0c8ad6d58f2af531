"""Two models on the same images: counts by hand, McNemar against a coin, intervals against a simulation."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path
from typing import Any

import pytest
import torch

from advalign.comparison import Difference, compare, comparison_table
from advalign.errors import UserError

SETTING = {"data": "digits", "images": "abc", "threat": "Linf(0.2)", "n": 6, "attack_seed": 0, "precision": "fp32"}


def result(folder: Path, name: str, outcomes: dict[str, str], **changes: Any) -> Path:
    path = folder / name / "evaluations" / "best.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"records": [{**SETTING, **changes}], "outcomes": outcomes}))
    return folder / name


def test_counts_by_hand(tmp_path: Path):
    a = result(tmp_path, "a", {"clean": "111110", "fgsm": "110000"})
    b = result(tmp_path, "b", {"clean": "111101", "fgsm": "101110", "mim": "000000"})
    clean, fgsm = compare(a, b)
    assert clean == Difference("clean", 5 / 6, 5 / 6, 1, 1, 6)
    assert fgsm == Difference("fgsm", 2 / 6, 4 / 6, 1, 3, 6)
    assert compare(a / "evaluations" / "best.json", b) == [clean, fgsm]
    table = comparison_table([clean, fgsm], "a", "b")
    assert table.rows[1][:3] == ("fgsm", "33.3", "66.7")
    assert table.rows[1][4] == "1 / 3"


@pytest.mark.parametrize(("first", "second"), [(1, 3), (0, 5), (7, 7), (30, 12), (0, 0)])
def test_mcnemar_is_a_coins_tail(first: int, second: int):
    p = Difference("clean", 0.5, 0.5, first, second, 100).p_value
    differ, fewer = first + second, min(first, second)
    tail = sum(comb(differ, k) for k in range(fewer + 1)) / 2**differ
    assert p == pytest.approx(min(1.0, 2 * tail))


def test_the_interval_covers_the_truth_about_19_times_in_20():
    torch.manual_seed(0)
    n, gap, covered = 400, 0.05, 0
    for _ in range(400):
        draws = torch.rand(n)  # .15 only the first, .20 only the second
        d = Difference("clean", 0, 0, int((draws < 0.15).sum()), int((draws > 0.80).sum()), n)
        covered += d.interval[0] <= gap <= d.interval[1]
    assert 370 <= covered <= 390


@pytest.mark.parametrize("change", [{"images": "other"}, {"n": 5}, {"threat": "L2(0.5)"}, {"attack_seed": 1}])
def test_different_questions_are_not_compared(tmp_path: Path, change: dict[str, Any]):
    a, b = result(tmp_path, "a", {"clean": "111110"}), result(tmp_path, "b", {"clean": "111110"}, **change)
    with pytest.raises(UserError, match="no evaluation in common"):
        compare(a, b)


def test_what_is_no_result_is_refused(tmp_path: Path):
    a = result(tmp_path, "a", {"clean": "1"})
    (tmp_path / "odd.json").write_text("[1]")
    with pytest.raises(UserError, match="is no result of advalign evaluate"):
        compare(a, tmp_path / "odd.json")
    with pytest.raises(UserError, match="no evaluations in"):
        compare(a, tmp_path / "nowhere")
