"""What a table marks, and how it is spelled elsewhere: the noise of the best, the flags of a recipe."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import numpy as np
from tests.samples import RECORD

from advalign.objectives import BASES
from advalign.report.rows import is_defense, is_first_stage
from advalign.report.tables import Table, accuracy_table
from advalign.report.trade_off import TradeOffPoint, pareto, trade_off_figure


def measured(method: str, *accuracies: float):
    return [
        replace(RECORD, method=method, seed=seed, run=f"{method}{seed}", accuracy=accuracy)
        for seed, accuracy in enumerate(accuracies)
    ]


def test_single_seeds_are_told_apart_beyond_the_binomial_of_their_images():
    # n = 500. 93 to 95 %: 2 sqrt(.93 .07 / 500 + .95 .05 / 500) = 3.0 points; 91 to 95 %: 3.2 points
    table = accuracy_table([*measured("best", 0.95), *measured("near", 0.93), *measured("far", 0.91)])
    assert table.best == {(0, 1)}
    assert table.faint == {(1, 1)}


def test_seeds_are_told_apart_beyond_the_standard_error_and_never_below_half_a_point():
    table = accuracy_table(
        [
            # Student's t of 2 + 2 seeds, two degrees of freedom, 95 %: 4.303
            *measured("best", 0.950, 0.952),  # mean 95.1, squared standard error .02 / 2
            *measured("wide", 0.930, 0.950),  # 1.1 below; 4.303 sqrt(2 / 2 + .01) = 4.3
            *measured("near", 0.940, 0.944),  # .9 below; 4.303 sqrt(.08 / 2 + .01) = .96
            *measured("tight", 0.9469, 0.9471),  # .4 below; 4.303 sqrt(.0002 / 2 + .01) = .43, but the floor is .5
            *measured("apart", 0.939, 0.943),  # 1.0 below; .96 as above
        ]
    )
    assert table.best == {(0, 1)}
    assert table.faint == {(1, 1), (2, 1), (3, 1)}
    assert "95 % interval" in table.caption


def test_natural_models_compete_only_with_one_another():
    table = accuracy_table([*measured("natural", 0.99), *measured("at", 0.9), *measured("trades", 0.5)])
    assert table.best == {(1, 1)}
    alone = accuracy_table([*measured("natural", 0.99), *measured("contrast", 0.5)])
    assert alone.best == {(0, 1)}


def test_marks_are_bold_and_italic_in_every_spelling_but_csv():
    table = Table(("a_b", "c"), (("x", "1"), ("y|z", "2 %")), frozenset({(1, 1)}), "Told.", faint=frozenset({(0, 1)}))
    assert "| x | *1* |\n| y\\|z | **2 %** |" in table.markdown()
    assert r"x & \textit{1} \\" in table.latex()
    assert r"\textbf{2 \%}" in table.latex()
    assert r"a\_b & c \\" in table.latex()
    assert tuple(map(tuple, csv.reader(io.StringIO(table.csv())))) == (table.columns, *table.rows)


def test_csv_keeps_commas_quotes_and_lines():
    rows = (('pgd(steps=20, loss="margin")', "1,5"), ("two\nlines", ""))
    table = Table(("method", "value"), rows, frozenset(), "")
    assert list(csv.reader(io.StringIO(table.csv()))) == [["method", "value"], *map(list, rows)]


def settings(**recipes: str):
    return [replace(RECORD, recipe=recipe, run=run) for run, recipe in recipes.items()]


def test_recipes_are_told_by_the_flags_that_differ():
    flags = {
        "a": {"lr": "0.1", "steps": "10", "epochs": "15"},
        "b": {"lr": "0.1", "steps": "5", "epochs": "15"},
        "c": {"lr": "0.2", "steps": "5", "epochs": "15"},
    }
    table = accuracy_table(settings(a="r1", b="r2", c="r3"), flags)
    assert table.columns[-1] == "recipe"
    assert [row[-1] for row in table.rows] == ["lr=0.1, steps=10", "lr=0.1, steps=5", "lr=0.2, steps=5"]


def test_what_no_flag_tells_the_digest_does():
    same = {"lr": "0.1", "steps": "10"}
    guests = accuracy_table(settings(a="r1", b="r2"), {"a": same, "b": dict(same)})
    assert [row[-1] for row in guests.rows] == ["r1", "r2"]
    unknown = accuracy_table(settings(a="r1", b="r2", c="r3"), {"a": same, "b": {**same, "steps": "5"}})
    assert [row[-1] for row in unknown.rows] == ["steps=10", "steps=5", "r3"]


def test_flags_of_another_method_do_not_differ():
    records = [*settings(a="r1", b="r2"), replace(RECORD, method="at", recipe="r3", run="c")]
    flags = {"a": {"lr": "0.1", "steps": "10"}, "b": {"lr": "0.1", "steps": "5"}, "c": {"lr": "0.9", "steps": "5"}}
    assert [row[-1] for row in accuracy_table(records, flags).rows] == ["steps=10", "steps=5", "steps=5"]


def test_the_front_is_what_no_point_beats():
    # by hand: (3, 3) beats (2, 2) and (3, 1); (1, 5) and (5, 1) are at the ends; of equals one is kept
    points = [(2, 2), (3, 3), (1, 5), (5, 1), (3, 1), (3, 3), (4, 1)]
    assert pareto(points) == [(1, 5), (3, 3), (5, 1)]


def test_the_plot_shows_the_front_and_tells_each_point():
    both = [
        record
        for method, clean, robust in (("natural", 0.95, 0.0), ("at", 0.90, 0.5), ("bad", 0.89, 0.4))
        for record in (
            replace(RECORD, method=method, run=method, accuracy=clean),
            replace(RECORD, method=method, run=method, accuracy=robust, attack="worst(fgsm)"),
        )
    ]
    lines = {line.get_label(): line for line in trade_off_figure(both).axes[0].lines}
    assert np.array(lines["Pareto front"].get_xydata()).tolist() == [[90, 50], [95, 0]]
    labels = [line.get_gid() for line in lines.values() if line.get_gid()]
    assert "hover: at: clean 90.0 %, robust 50.0 %, 1 seed" in labels
    assert str(TradeOffPoint(90, 50, 1, 2, 3, "at", "")) == "at: clean 90.0 ± 1.0 %, robust 50.0 ± 2.0 %, 3 seeds"


def test_defenses_and_first_stages_are_known_from_the_methods():
    assert [is_defense(method) for method in ("natural", "at", "trades+vfd", "afa", "net.pt, evaluated only")] == [
        False, True, True, True, True,
    ]  # fmt: skip
    assert [name for name in BASES if is_first_stage(name)] == ["contrast"]
    assert not is_first_stage("net.pt, evaluated only")
