"""The page of a frontier and its place in reports, from outcomes made by hand: each number can be counted."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from tests.markup import Checked
from tests.samples import RECORD

from advalign.cli.listing import LISTS
from advalign.frontier.frontier import DIALS
from advalign.frontier.result import StoredFrontier, read_frontier
from advalign.report import report_on
from advalign.report.commands import frontier_line, repeat_frontier
from advalign.report.frontier import attack_table, curve_table, frontier_name, write_page
from advalign.report.frontier_words import alarms, summary
from advalign.report.same_clean import frontiers_of, robust_at
from advalign.report.sources import Scope, find_sources
from advalign.runs import Run, append_records
from advalign.runs.formats import write_checked_json

ATTACK = "pgd(steps=5)"
MIDDLE = "weight=0.8, temperature=0.5"
# Of ten images each: what is right of clean images, and of the examples made on each network.
ACCURATE = {"clean": "1111111110", "robust network": "1110000000", "accurate network": "0000000000",
            f"{ATTACK} on weight=0": "0000000000", f"{ATTACK} on {MIDDLE}": "1000000000",
            f"{ATTACK} on weight=1": "1110000000"}  # fmt: skip
MIXED = {"clean": "1111111100", "robust network": "1111110000", "accurate network": "1111111000",
         f"{ATTACK} on weight=0": "1111111000", f"{ATTACK} on {MIDDLE}": "1111100000",
         f"{ATTACK} on weight=1": "1111111000"}  # fmt: skip
ROBUST = {"clean": "1111111000", "robust network": "1111110000", "accurate network": "1111111000",
          f"{ATTACK} on weight=0": "1111111000", f"{ATTACK} on {MIDDLE}": "1111111000",
          f"{ATTACK} on weight=1": "1111110000"}  # fmt: skip


def point(sources: dict[str, str], floor: str) -> dict[str, object]:
    worst = "".join(min(column) for column in zip(*sources.values(), strict=True))
    return {"robust": worst, "sources": sources, "floor": floor}


def written(
    folder: Path,
    *,
    mixed: dict[str, str] = MIXED,
    floor: str = "1111100000",
    chosen: int = 1,
    held_out: Sequence[dict[str, object]] | None = None,
    **changes: object,
) -> StoredFrontier:
    """Write a `frontier.json` of three settings on ten images, and read it."""
    points = [point(ACCURATE, "0" * 10), point(mixed, floor), point(ROBUST, "1111110000")]
    content = {
        "method": "mix",
        "robust": {"method": "trades+vfd", "model": "small-cnn", "weights": "a" * 16, "run": "robust0"},
        "accurate": {"method": "natural", "model": "small-cnn", "weights": "b" * 16},
        "data": "digits", "images": "0123", "threat": "Linf(0.2)",
        "images_held_out": "10 training images that neither network was trained on",
        "give": 10.0, "rule": "the highest clean accuracy", "curve_attack": ATTACK, "attacks": ["fgsm"],
        "settings": [{"weight": 0.0}, {"weight": 0.8, "temperature": 0.5}, {"weight": 1.0}],
        "chosen": chosen, "held_out": held_out or points, "test": points, "environment": {"torch": "2"},
        "run": "chosen0", "options": {"points": 3, "held_out": "10", "checkpoint": "best", "seed": 1}, **changes,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write_checked_json(folder / "frontier.json", content)
    return read_frontier(folder / "frontier.json")


def test_the_tables_count_outcomes(tmp_path: Path):
    stored = written(tmp_path)
    assert curve_table(stored).rows == (
        ("weight=0", "90.0", "0.0", "0.0"), (MIDDLE, "80.0", "50.0", "50.0"), ("weight=1", "70.0", "60.0", "60.0"),
    )  # fmt: skip
    # of the middle: its own attack leaves 5 of 10, the robust network's min-margin examples 6, the accurate one's 7
    assert attack_table(stored).rows[1] == (MIDDLE, "80.0", "50.0", "60.0", "70.0", "–", "50.0", "0.0")
    # examples made on an end are that end's own
    assert attack_table(stored).rows[2] == ("weight=1", "70.0", "60.0", "–", "70.0", "70.0", "60.0", "0.0")


def test_the_table_fits_a_terminal(tmp_path: Path):
    stored = written(tmp_path, settings=[{"weight": 0}, {"weight": 0.123456, "temperature": 0.05}, {"weight": 1}])
    widths = [max(map(len, column)) + 3 for column in zip(*curve_table(stored).rows, strict=True)]
    assert sum(widths) < 80
    assert all(len(heading) <= 7 for heading in curve_table(stored).columns)


def test_the_summary_says_what_is_gained_and_lost(tmp_path: Path):
    text = "\n".join(summary(written(tmp_path)))
    assert "natural, has 90.0 % clean and 0.0 % robust accuracy" in text
    assert "trades+vfd, 70.0 % clean and 60.0 % robust accuracy" in text
    assert f"Chosen: {MIDDLE}. It has 80.0 % clean and 50.0 % robust accuracy: +10.0 [" in text
    assert "-10.0 [" in text  # and with so few images nothing is certain
    assert "So many images do not tell" in text
    assert "two forward passes" in text
    assert "20.0 % of the test images right that the robust one has wrong" in text  # images 8 and 9
    assert "two forward passes" not in "\n".join(summary(written(tmp_path, method="weights")))


def test_a_choice_that_is_no_more_accurate_on_the_test_images_is_called_so(tmp_path: Path):
    losing = {**MIXED, "clean": "1111110000"}
    points = [point(ACCURATE, "0" * 10), point(losing, "1111100000"), point(ROBUST, "1111110000")]
    text = "\n".join(summary(written(tmp_path, test=points)))
    assert "-10.0 [" in text
    assert "It gains nothing there: keep the robust network" in text


def test_networks_that_are_right_on_the_same_images_are_not_worth_mixing(tmp_path: Path):
    clean = {**ACCURATE, "clean": ROBUST["clean"]}
    points = [point(clean, "0" * 10), point(MIXED, "1111100000"), point(ROBUST, "1111110000")]
    assert "mixing the two cannot pay" in "\n".join(summary(written(tmp_path, test=points)))


def test_where_the_robust_network_was_chosen_it_says_why_and_what_would_choose_another(tmp_path: Path):
    text = "\n".join(summary(written(tmp_path, chosen=2, give=1.0)))
    assert "The robust network itself was chosen" in text
    assert f"Least is lost at {MIDDLE}: 10.0 points, for +10.0 points of clean accuracy" in text
    assert "Try --give 10, which admits it" in text
    no_better = [point({**ROBUST, "robust network": "0" * 10}, "0" * 10)] * 2 + [point(ROBUST, "1111110000")]
    text = "\n".join(summary(written(tmp_path, chosen=2, held_out=no_better)))
    assert "no setting is more accurate" in text


def test_examples_from_elsewhere_that_break_more_are_an_alarm(tmp_path: Path):
    assert "No sign of masked gradients" in "\n".join(alarms(written(tmp_path)))
    hidden = {**MIXED, "accurate network": "0111100000", f"{ATTACK} on {MIDDLE}": "1111110000"}
    (line,) = alarms(written(tmp_path, mixed=hidden, floor="0111100000"))
    # its own attack leaves images 1 to 6; 1 and 6 fall to others: the accurate network's examples
    assert f"Masked gradients? {MIDDLE} (20.0)" in line


def test_far_above_the_floor_is_an_alarm_beside_an_accurate_network_that_withstands_nothing(tmp_path: Path):
    (line,) = alarms(written(tmp_path, floor="1100000000"))
    assert f"Far from the floor: {MIDDLE} (30.0)" in line
    sound = {**ACCURATE} | dict.fromkeys(ACCURATE.keys() - {"clean"}, "1110000000")
    points = [point(sound, "0" * 10), point(MIXED, "1100000000"), point(ROBUST, "1111110000")]
    assert "No sign" in "\n".join(alarms(written(tmp_path, test=points)))


def test_without_a_floor_the_page_has_none(tmp_path: Path):
    points = [point(each, "") for each in (ACCURATE, MIXED, ROBUST)]
    stored = written(tmp_path, test=points, held_out=points, method="weights")
    assert curve_table(stored).rows[1] == (MIDDLE, "80.0", "50.0", "–")
    assert "floor:" not in curve_table(stored).caption
    assert "Dashed" not in write_page(stored).read_text()


def test_the_page_is_one_sound_file(tmp_path: Path):
    page = write_page(written(tmp_path, note="<i>an unusual set of images</i>"))
    assert page == tmp_path / "frontier.html"
    checked, text = Checked(page.read_text()), page.read_text()
    assert not [each for each in checked.loaded if not each.startswith(("data:", "#"))]
    assert checked.titles[0] == "Frontier: mix(trades+vfd, natural)"
    assert "50.0" in checked.cells
    for words in ("Clean against robust accuracy", "How much each attack took", "The command that repeats it",
                  "The rule:", "clean accuracy, %", "robust accuracy, %", f"{MIDDLE}, 10 test images: clean 80.0 %",
                  "&lt;i&gt;an unusual"):  # fmt: skip
        assert words in text
    assert sorted(each.name for each in tmp_path.iterdir()) == ["frontier.html", "frontier.json"]


def test_the_command_names_what_the_file_tells(tmp_path: Path):
    content = written(tmp_path).content
    *notes, line = repeat_frontier(content, {"robust0": Path("runs/r")}).splitlines()
    assert notes == ["# ACCURATE: natural, the run or weights file with digest bbbbbbbbbbbbbbbb"]
    assert line == (
        "advalign frontier runs/r ACCURATE --method mix --give 10 --attacks fgsm --curve-attack 'pgd(steps=5)' "
        "--data digits --n 10 --norm linf --eps 0.2 --points 3 --held-out 10 --checkpoint best --seed 1"
    )
    apart = {**content, "options": {"held_out": "test:10"}}
    assert "--n 20 " in repeat_frontier(apart, {})  # the ten that were set apart are test images as well


def test_the_command_names_the_networks_that_the_way_takes(tmp_path: Path):
    content = written(tmp_path, method="finetune", attacks=[]).content
    assert "advalign frontier ROBUST --method finetune --give 10 --attacks none " in repeat_frontier(content, {})
    third = {"method": "at", "model": "small-cnn", "weights": "c" * 16}
    soup = written(tmp_path, method="soup", further=[third])
    assert "advalign frontier ROBUST-1 ROBUST-2 ROBUST-3 --method soup" in repeat_frontier(soup.content, {})
    assert frontier_name(soup) == "soup(trades+vfd, natural, at)"
    assert "the second robust network, natural, has 90.0 %" in summary(soup)[0]


def test_every_way_is_listed_with_a_line():
    assert [name for name, _ in LISTS["frontiers"]()] == list(DIALS)
    assert all(20 < len(line) < 110 for _, line in LISTS["frontiers"]())


def run_of_frontier(root: Path, **choice: object) -> Run:
    choice = {"by": "mix", "give": 10.0, "attack": ATTACK, "setting": {"weight": 0.8}, **choice}
    setting = {
        "method": "mix(trades+vfd, natural, weight=0.8)", "data": "digits", "shape": [1, 8, 8], "recipe": {"seed": 0},
        "model": 'mix(robust="small-cnn", accurate="small-cnn", weight=0.8)', "frontier": choice,
        "guests": {"robust": "robust0", "accurate": "b" * 16},
    }  # fmt: skip
    run = Run.at(root, setting)
    run.path.mkdir(parents=True)
    run.write_card("finished", {}, {})
    return run


def in_report(tmp_path: Path) -> tuple[Path, Run]:
    """Two trained networks and the chosen one of a frontier, on ten test images."""
    trained = replace(RECORD, n=10, method="trades", run="r1", accuracy=0.75)
    rows = [trained, replace(trained, attack="worst(fgsm)", accuracy=0.4),
            replace(trained, method="at", run="r2", accuracy=0.2),
            replace(trained, method="at", run="r2", attack="worst(fgsm)", accuracy=0.1)]  # fmt: skip
    append_records(tmp_path / "records.jsonl", rows)
    run = run_of_frontier(tmp_path / "runs")
    sets = [f"transfer({ATTACK}, from trades+vfd x)", f"transfer({ATTACK}, from natural y)"]
    mix = replace(trained, method=run.setting["method"], model=run.setting["model"], run=run.id)
    names = ("clean", *sets, ATTACK, f"worst({', '.join(sets)}, {ATTACK})")
    append_records(run.path / "records.jsonl", [replace(mix, attack=name, accuracy=0.5) for name in names])
    written(tmp_path / "frontiers" / "one", run=run.id)
    return tmp_path, run


def test_the_report_shows_curve_table_and_command(tmp_path: Path):
    folder, run = in_report(tmp_path)
    written(folder / "frontiers" / "other", images="4567")
    (table,) = report_on([folder], tmp_path / "r.html", maps=0)
    text = (tmp_path / "r.html").read_text()
    name = "mix(trades+vfd, natural)"
    assert f"{MIDDLE}, {name}: clean 80.0 %, robust 50.0 %" in text
    assert "At the same clean accuracy" in text
    # 75 % clean lies half way between the robust network (70, 60) and the middle (80, 50)
    rows = (tmp_path / "r-files").glob("at-the-same-clean-accuracy*.csv")
    lines = next(rows).read_text().splitlines()
    assert "trades,75.0,40.0,55.0,worst(fgsm)" in lines
    assert "at,20.0,10.0,–,worst(fgsm)" in lines
    assert "advalign frontier ROBUST ACCURATE" in text
    assert "advalign train mix" not in text
    assert table.columns == ("method", "clean", ATTACK, "worst case", "model")
    assert "small-cnn and small-cnn" in "".join(map("".join, table.rows))
    assert run.id in text
    assert "other/frontier.json: no trained network was measured on its images" in text
    assert "one/frontier.json: no" not in text


@pytest.mark.parametrize(
    "other", [{"images": "4567"}, {"threat": "Linf(0.1)"}, {"options": {"held_out": "test:10"}}], ids=str
)
def test_curves_on_other_images_or_in_another_threat_are_left_out(other: dict, tmp_path: Path):
    scope = Scope("digits", "0123", "Linf(0.2)", 10)
    assert frontiers_of(scope, [stored := written(tmp_path / "one")]) == [stored]
    assert frontiers_of(scope, [written(tmp_path / "other", **other)]) == []
    assert frontiers_of(scope._replace(n=20), [stored]) == []


def test_a_damaged_file_is_named_and_the_rest_is_shown(tmp_path: Path):
    folder, _ = in_report(tmp_path)
    file = folder / "frontiers" / "one" / "frontier.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "chosen": 0}))
    sources = find_sources([folder, file])
    assert sources.frontiers == []
    (line,) = sources.unreadable
    assert re.fullmatch(r"Not read: .*frontier\.json .*", line)
    assert {record.method for record in sources.records} >= {"trades", "at"}


def test_a_run_whose_frontier_is_not_there_is_repeated_by_what_it_tells(tmp_path: Path):
    *notes, line = frontier_line(run_of_frontier(tmp_path), {"robust0": Path("r")}).splitlines()
    assert notes == [f"# ACCURATE: the run or weights file with digest {'b' * 16}, not below these paths"]
    arguments = f"--method mix --give 10 --curve-attack 'pgd(steps=5)' --data digits --runs {tmp_path}"
    assert line == f"advalign frontier r ACCURATE {arguments}"


def test_a_run_that_tells_all_is_repeated_with_all(tmp_path: Path):
    run = run_of_frontier(tmp_path, points=7, held_out="test:10", threat="L2(0.5)")
    line = frontier_line(run, {"robust0": Path("r"), "b" * 16: Path("a")})
    assert line.endswith(f"--runs {tmp_path} --points 7 --held-out test:10 --norm l2 --eps 0.5")


@pytest.mark.parametrize(
    ("clean", "robust"), [(70, 60), (72, 58), (85, 25), (90, 0), (69.9, None), (90.1, None)], ids=str
)
def test_between_two_settings_a_straight_line(clean: float, robust: float | None, tmp_path: Path):
    found = robust_at(written(tmp_path).test, clean)
    assert found == (None if robust is None else pytest.approx(robust))
