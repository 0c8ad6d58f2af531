"""Collapses of robust accuracy in the report: which runs were watched, and what happened to them."""

from __future__ import annotations

from typing import Any

from advalign.report.training import collapse_section


def log(**changes: Any) -> list[dict[str, Any]]:
    return [{"epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 0.5, **changes}]


COLLAPSE = {"epoch": 1.67, "before": 0.41, "after": 0.02, "back_to": 1.33, "steps": 5}


def test_each_collapse_is_a_row():
    section = collapse_section(
        {"at": log(), "trades": log(guard=[0.4, 0.41]), "at, n-fgsm": log(guard=[0.4], collapses=[COLLAPSE])}
    )
    assert section is not None
    assert section.table.rows == (("at, n-fgsm", "1.67", "41", "2", "1.33", "PGD, 5 steps"),)
    assert "watched 2 of 3 runs" in section.table.caption
    assert "saw 1 collapse of" in section.table.caption


def test_without_a_guard_there_is_no_section_and_with_one_it_says_that_all_was_well():
    assert collapse_section({"at": log()}) is None
    section = collapse_section({"at": log(guard=[0.4])})
    assert section is not None
    assert "saw no collapses of" in section.table.caption
