"""Names in figures: letter by letter, in every format, and without a warning (warnings are errors here)."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from tests.samples import RECORD

from advalign.evaluation.diagnose import Diagnosis
from advalign.report.classes import class_figure
from advalign.report.diagnosis import accuracy_curves
from advalign.report.figures import HOVER, MOST_NAMES, drawn, png
from advalign.report.svg import inline, svg
from advalign.report.trade_off import trade_off_figure
from advalign.report.training import calibration_curves, training_curves
from advalign.runs import Record

NAMES = ("$\\foo$", "100% $^$", "\u732b\u72d7", '<b>&"', "a_b^c", "\U0001f600")


def of_classes(names: tuple[str, ...]) -> Figure:
    return class_figure({f"at, {names[0]}": ([50.0] * len(names), [20.0] * len(names))}, names)


def words(figure: Figure) -> list[str]:
    root = ElementTree.fromstring(svg(figure, "a"))
    return ["".join(text.itertext()).strip() for text in root.iter("{http://www.w3.org/2000/svg}text")]


def test_names_stand_for_themselves():
    assert {*NAMES, f"at, {NAMES[0]}"} <= set(words(of_classes(NAMES)))


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["png", "pdf"])
def test_a_letter_that_no_font_has_is_drawn_as_its_escape(ending: str):
    unassigned = "\U000e5678"
    options = {"metadata": {"CreationDate": None}} if ending == "pdf" else {}
    escaped = drawn(of_classes(("\\U000e5678", "x")), ending, **options)
    assert drawn(of_classes((unassigned, "x")), ending, **options) == escaped


@pytest.mark.slow
def test_control_characters_and_halves_of_characters_leave_a_sound_svg():
    figure = of_classes(("a\x01b", "\udcff"))
    assert {"a\\x01b", "\\udcff"} <= set(words(figure))
    log = [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 0.2}]
    assert "<title>a\\x01b</title>" in inline(svg(training_curves({"a\x01b": log}), "a"))


@pytest.mark.slow
def test_a_figure_is_as_it_was_after_it_was_drawn():
    figure = training_curves({f"{NAMES[0]} {NAMES[2]}": [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 0.002}]})
    before = png(figure)
    first = svg(figure, "a")
    assert png(figure) == before
    assert svg(figure, "a") == first
    assert [line.get_gid() for line in figure.axes[0].lines] == [f"{HOVER}{NAMES[0]} {NAMES[2]}"]


def test_powers_of_ten_are_still_mathematics():
    text = words(training_curves({"at": [{"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 0.002}]}))
    assert not any("mathdefault" in word for word in text)
    curves = Diagnosis((), 10, "Linf(0.1)", {1: 0.5, 10: 0.4}, {0.0: 0.9, 0.1: 0.4}, None)
    assert "PGD, Linf(0.1)" in words(accuracy_curves(curves))


def test_of_very_many_runs_the_pointer_tells_the_name_and_no_legend():
    log = [{"epoch": 1, "loss": 2.0, "validation": {"clean": 0.5, "robust": 0.2}}, {"epoch": 2, "loss": 0.2}]
    named, unnamed = (training_curves({f"run {i}": log for i in range(n)}) for n in (MOST_NAMES, MOST_NAMES + 1))
    assert len(named.legends[0].get_texts()) == MOST_NAMES
    assert not unnamed.legends
    assert unnamed.get_figheight() < 4
    assert {f"{HOVER}run {i}" for i in range(MOST_NAMES + 1)} == {line.get_gid() for line in unnamed.axes[0].lines}
    measured = {"layer3": {"distance_clean": 1.0, "distance_adv": 2.0, "ratio": 0.1}}
    calibrated = {f"run {i}": [{"epoch": 1, "calibration": {"vfd": measured}}] for i in range(MOST_NAMES + 1)}
    figure = calibration_curves(calibrated)
    assert not figure.legends
    assert {f"{HOVER}{run}, layer3" for run in calibrated} == {line.get_gid() for line in figure.axes[1].lines}


def test_the_trade_off_of_very_many_models_has_a_mark_with_a_text_for_each_and_no_other_names():
    def model(i: int) -> list[Record]:
        method = f"at+part(weight={i})" if i % 2 else f"model {i}"
        attacks = {"clean": 0.9, "worst(fgsm, pgd(steps=20))": 0.4}
        return [replace(RECORD, method=method, run=f"r{i}", attack=name, accuracy=a) for name, a in attacks.items()]

    few, many = (trade_off_figure([each for i in range(n) for each in model(i)]) for n in (4, 2 * MOST_NAMES + 4))
    assert few.axes[0].texts
    assert not many.axes[0].texts
    assert not many.legends
    marks = [line.get_gid() or "" for line in many.axes[0].lines]
    assert sum(mark.startswith(HOVER) for mark in marks) == 2 * MOST_NAMES + 4
