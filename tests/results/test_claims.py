"""Tables on VFD-Adv's claims: changes and their noise by hand, the paper's changes typed a second time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from results.claims import claims, study_in, sweep_table
from tests.samples import RECORD

from advalign.errors import UserError
from advalign.runs import Record, append_records
from advalign.studies import SCALES, STUDIES

TABLE1 = STUDIES["table1"](SCALES["tiny"])
SURROGATE = "natural small-cnn(width=64) 0123456789"
ATTACKS = {
    "clean": "clean", "FGSM": "fgsm", "PGD": "pgd(steps=20)", "AA": "autoattack", "C&W": "cw(steps=1000)",
    "black-box PGD": f"transfer(pgd(steps=20), from {SURROGATE})",
}  # fmt: skip


def measured(method: str, seed: int = 0, **accuracies: float) -> list[Record]:
    """Make records of accuracies by heading, as the tiny scale has them: few images for the slow attacks."""
    return [
        replace(
            RECORD, method=method, run=f"{method}{seed}", seed=seed, attack=ATTACKS[heading], accuracy=accuracy / 100,
            n=250 if heading in ("AA", "C&W") else 10_000, data="cifar10", threat="Linf(8/255)",
        )
        for heading, accuracy in accuracies.items()
    ]  # fmt: skip


def row_of(table, name: str) -> dict[str, str]:
    (row,) = (row for row in table.rows if row[0] == name)
    return dict(zip(table.columns[1:], row[1:], strict=True))


def test_a_change_is_told_from_none_beyond_the_binomial_of_its_own_images():
    # 10,000 images: 2 sqrt(2 x .4 x .6 / 10000) = 1.4 points; 250 images: 2 sqrt(2 x .2 x .8 / 250) = 7.2 points
    records = [
        *measured("trades", **{"clean": 40, "PGD": 40, "FGSM": 40, "AA": 20, "C&W": 20, "black-box PGD": 40}),
        *measured("trades+vfd", **{"clean": 41.3, "PGD": 38, "FGSM": 40, "AA": 26.8, "C&W": 28, "black-box PGD": 42}),
    ]
    table = claims(TABLE1, records)
    assert row_of(table, "trades, ours") == {
        "clean": "(+1.3)", "PGD": "-2.0", "FGSM": "(+0.0)", "AA": "(+6.8)", "C&W": "+8.0", "black-box PGD": "+2.0"
    }  # fmt: skip
    for words in ("seed: 0;", "a row of one seed", "test images: 10000, 250 for C&W and AA", f"made on {SURROGATE};"):
        assert words in table.caption


def test_what_is_not_measured_is_a_dash_and_no_other_column():
    records = [*measured("mart", clean=40, PGD=30), *measured("mart+vfd", clean=45), *measured("alp+vfd", clean=45)]
    table = claims(TABLE1, records)
    assert row_of(table, "mart, ours") == {
        "clean": "+5.0", "PGD": "–", "FGSM": "–", "AA": "–", "C&W": "–", "black-box PGD": "–"
    }  # fmt: skip
    assert set(row_of(table, "alp, ours").values()) == {"–"}


def test_several_seeds_count_by_their_spread_and_only_those_of_both():
    records = [
        *measured("hat", 0, clean=40, PGD=40), *measured("hat", 1, clean=42, PGD=40.2), *measured("hat", 2, clean=90),
        # standard errors of the means: clean 1 and 1, so 4.3 sqrt(2) = 6.1 points; PGD .1 and .2: 4.3 sqrt(.05) = .96
        *measured("hat+vfd", 0, clean=42.5, PGD=41.0), *measured("hat+vfd", 1, clean=44.5, PGD=41.4),
    ]  # fmt: skip
    table = claims(TABLE1, records)
    assert row_of(table, "hat, ours")["clean"] == "(+2.5)"
    assert row_of(table, "hat, ours")["PGD"] == "+1.1"
    assert "a row of one seed" not in table.caption


def test_the_paper_s_changes_are_the_source_s():
    """Typed a second time, from differences of the published table worked out by hand."""
    table = claims(TABLE1, measured("trades", clean=40))
    columns = ("clean", "PGD", "FGSM", "C&W", "AA", "black-box PGD")
    for base, changes in {
        "alp": ("+4.6", "+0.8", "+5.4", "+3.4", "–", "+3.0"),
        "trades": ("+6.4", "+1.2", "+3.1", "+2.3", "–", "+6.4"),
        "mart": ("+6.4", "-0.8", "+2.1", "+0.8", "–", "+7.4"),
        "hat": ("+4.4", "+2.4", "+4.1", "+1.6", "–", "+4.0"),
    }.items():
        assert row_of(table, f"{base}, paper") == dict(zip(columns, changes, strict=True))
    assert [row[0].partition(",")[0] for row in table.rows[::2]] == ["alp", "trades", "mart", "hat"]


def test_the_sweep_of_the_weight_is_beside_trades():
    records = [
        *measured("trades", clean=40, PGD=30, AA=20),
        *measured("trades+vfd(weight=0.005)", clean=44, PGD=29, AA=16),
        *measured("trades+vfd", clean=47, PGD=25),  # .02 is the default
    ]
    table = sweep_table(STUDIES["figure4b"](SCALES["tiny"]), records)
    accuracies = ("clean", "FGSM", "PGD", "AA")
    assert table.columns == ("weight", *accuracies, *(f"Δ {each}" for each in accuracies))
    assert [row[0] for row in table.rows] == ["0", "0.005", "0.01", "0.015", "0.02", "0.025", "0.03", "0.035", "0.04"]
    assert table.rows[0][1:] == ("40.0", "–", "30.0", "20.0", "", "", "", "")
    assert table.rows[1][1:] == ("44.0", "–", "29.0", "16.0", "+4.0", "–", "(-1.0)", "(-4.0)")
    assert table.rows[4][1:] == ("47.0", "–", "25.0", "–", "+7.0", "–", "-5.0", "–")
    assert set(table.rows[2][1:]) == {"–"}
    assert table.best == {(4, 1), (0, 3), (0, 4)}
    assert table.faint == {(1, 3), (1, 4)}  # 1 of 30 points on 10,000 images, 4 of 20 on 250


def test_the_sweep_of_the_layer_has_no_changes_where_trades_was_not_measured():
    study = STUDIES["figure4a"](SCALES["tiny"])
    records = [*measured('trades+vfd(layer="layer1")', clean=40), *measured("trades+vfd", clean=45)]
    table = sweep_table(study, records)
    assert table.columns == ("layer", "clean", "FGSM", "PGD", "AA")
    assert {row[0]: row[1] for row in table.rows} == {"layer1": "40.0", "layer2": "–", "layer3": "45.0", "logits": "–"}
    assert sweep_table(study, [*records, *measured("trades", clean=41)]).rows[0][5] == "(-1.0)"


def test_a_folder_names_its_study(tmp_path: Path):
    records = measured("trades", clean=40)
    append_records(tmp_path / "figure4b-tiny" / "records.jsonl", records)
    study, found = study_in(tmp_path / "figure4b-tiny")
    assert (study.cells, found) == (STUDIES["figure4b"](SCALES["tiny"]).cells, records)
    for name, reason in {
        "figure5-tiny": "unknown study 'figure5'",
        "table1-large": "unknown scale",
        "table1-tiny": "no re",
    }.items():
        with pytest.raises(UserError, match=reason):
            study_in(tmp_path / name)


def test_the_page_s_words_on_the_paper_are_its_numbers():
    """Prose beside the generated tables is typed: these are the numbers that it takes from the paper's tables."""
    text = (Path(__file__).parents[2] / "docs" / "findings.md").read_text()
    section = text[text.index("## The claims of VFD-Adv, one by one") :]
    section = " ".join(re.sub(r"<!-- claims.*?end of table -->", "", section, flags=re.DOTALL).split())
    tables = {data: STUDIES[name](SCALES["tiny"]).published for data, name in (("10", "table1"), ("100", "table2"))}

    def gains(data: str, *headings: str) -> list[float]:
        rows = tables[data]
        return [
            sum(rows[f"{base}+vfd"][each] - rows[base][each] for each in headings) / len(headings)
            for base in ("alp", "trades", "mart", "hat")
        ]

    white, black = ("PGD", "FGSM", "C&W"), ("black-box PGD", "black-box FGSM", "black-box C&W")
    for words in (
        "{:+.1f} (ALP), {:+.1f} (TRADES), {:+.1f} (MART) and {:+.1f} (HAT) on CIFAR-10".format(*gains("10", "clean")),
        "{:+.1f}, {:+.1f}, {:+.1f} and {:+.1f} on CIFAR-100".format(*gains("100", "clean")),
        f"all six columns: {gains('10', *white, *black)[1]:.2f}",
        "three white-box columns alone {:+.1f} (ALP), {:+.1f} (TRADES), {:+.1f} (MART) and {:+.1f} (HAT)".format(
            *gains("10", *white)
        ),
        "{:+.1f}, {:+.1f}, {:+.1f} and {:+.1f} on average of the three black-box columns".format(*gains("10", *black)),
    ):
        assert words in section
