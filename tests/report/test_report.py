"""Tables, figures and the page: the numbers shown are those of the records."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.samples import RECORD, records

from advalign.attacks.names import worst_cases_among
from advalign.errors import UserError
from advalign.report import report_on
from advalign.report.figures import png
from advalign.report.gallery import gallery
from advalign.report.sources import find_sources
from advalign.report.tables import accuracy_table
from advalign.report.trade_off import trade_off_figure
from advalign.report.training import calibration_curves, training_curves
from advalign.runs import append_records


def test_two_runs_of_one_seed_are_two_rows():
    """They differ in something that no record tells, such as the guests they were given."""
    other = [replace(record, run="other", accuracy=0.1) for record in records() if record.method == "trades+vfd"]
    table = accuracy_table([*records(), *other])
    rows = [row for row in table.rows if row[0] == "trades+vfd"]
    assert [row[1] for row in rows] == ["94.0", "10.0"]
    assert table.columns[-1] == "run"
    assert {row[-1] for row in rows} == {"trades+vfd0", "other"}


def test_means_spreads_and_bests_are_right():
    table = accuracy_table(records())
    assert table.columns == ("method", "clean", "worst case")
    # statistics by hand: mean 91, sd |92 - 90| / sqrt 2
    assert table.rows[0] == ("trades", "91.0 ± 1.4", "52.0 ± 2.8")
    assert table.rows[1] == ("trades(beta=1)", "95.0", "40.0")
    assert table.best == {(1, 1), (0, 2)}
    assert "| trades(beta=1) | **95.0** | 40.0 |" in table.markdown()


def test_what_differs_is_a_column_and_what_is_shared_is_said_once():
    mixed = [*records(), replace(RECORD, method="at", n=100, run="at")]
    table = accuracy_table(mixed)
    assert table.columns[-1] == "test images"
    assert "data: digits" in table.caption
    assert "test images:" not in table.caption
    assert table.rows[-1] == ("at", "95.0", "–", "100")


def test_how_weights_from_elsewhere_were_trained_is_not_known():
    foreign = [replace(record, run="", method="my.pt", training_images=0, epochs=0, seed=0) for record in records()[:2]]
    caption = accuracy_table(foreign).caption
    for words in ("training images: unknown", "epochs: unknown", "seeds: unknown"):
        assert words in caption
    assert "training images: unknown" not in accuracy_table(records()).caption


def test_seeds_alone_are_averaged():
    """Another recipe, data set or threat is another row, with the same seed too; what is found twice counts once."""
    twice = [RECORD, replace(RECORD), replace(RECORD, recipe="other", accuracy=0.05)]
    table = accuracy_table(twice)
    assert [row[:2] for row in table.rows] == [("trades", "95.0"), ("trades", "5.0")]
    assert table.columns[-1] == "recipe"
    for change in (
        {"images": "other"},
        {"precision": "bf16"},
        {"attack_seed": 1},
        {"threat": "L2(0.5)"},
        {"data": "b"},
    ):
        rows = accuracy_table([RECORD, replace(RECORD, **change, accuracy=0.05)]).rows
        assert {row[1] for row in rows} == {"95.0", "5.0"}
        assert len(set(rows)) == 2


def test_a_cell_of_fewer_seeds_says_so_and_the_plot_takes_those_that_have_both():
    some = [record for record in records() if not ("worst" in record.attack and record.seed == 1)]
    assert accuracy_table(some).rows[0] == ("trades", "91.0 ± 1.4", "50.0 (1 of 2 seeds)")
    drawn = trade_off_figure(some).axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(np.array(drawn), [[90, 50], [95, 40]])


def test_worst_cases_over_different_attacks_are_different_columns():
    some = [record for record in records() if "worst" in record.attack]
    weak = [replace(record, attack="worst(fgsm, square)", accuracy=0.9) for record in some]
    alone = [replace(record, attack="worst(square)", accuracy=0.9) for record in some]
    table = accuracy_table([*records(), *weak, *alone])  # a worst case of one attack is that attack
    found = [column for column in table.columns if "worst" in column]
    assert found == ["worst(fgsm, mim(steps=20))", "worst(fgsm, square)"]
    drawn = trade_off_figure([*records(), *weak]).axes[0].lines[0].get_xydata()
    np.testing.assert_allclose(np.array(drawn), [[91, 52], [95, 40]])  # the worst over the most attacks


def test_the_worst_case_is_over_attacks_and_not_over_letters_and_in_the_white_box():
    three, two = "worst(fgsm, mim, square)", 'worst(fgsm, pgd(steps=100, step_size=0.001, loss="margin"))'
    far = "worst(transfer(fgsm, from natural small-cnn(width=8) 0123456789), transfer(mim, from a b c), cw, pgd)"
    assert worst_cases_among([far, two, three, "clean"]) == [three, two, far]


def test_a_report_on_runs_and_their_collected_records_invents_no_spread(tmp_path: Path):
    append_records(tmp_path / "a" / "records.jsonl", records()[:2])
    append_records(tmp_path / "records.jsonl", records()[:2])
    (table,) = report_on([tmp_path, tmp_path / "a"], tmp_path / "page.html")
    assert table.rows == (("trades", "90.0", "50.0"),)


def test_trade_off_keeps_settings_apart():
    elsewhere = [replace(record, data="cifar10", accuracy=record.accuracy / 2) for record in records()]
    axes = trade_off_figure([*records(), *elsewhere]).axes[0]
    drawn = {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}
    np.testing.assert_allclose(drawn["trades, digits"], [[91, 52], [95, 40]])
    np.testing.assert_allclose(drawn["trades, cifar10"], [[45.5, 26], [47.5, 20]])


def test_trade_off_names_points_by_all_their_arguments_and_files_by_their_names():
    layers = 'trades(beta=1.5)+vfd(layer=("layer1", "a(b)"), weight=0.1)'
    names = (layers, "trades+vfd", "my_net(1).pt, evaluated only", "old_weights")
    pairs = [[replace(record, method=name, run=name) for record in records()[:2]] for name in names]
    axes = trade_off_figure([record for pair in pairs for record in pair]).axes[0]
    families = [str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")]
    assert sorted(families) == ["my_net(1).pt, evaluated only", "old_weights", "trades+vfd"]
    labels = {text.get_text() for text in axes.texts}
    assert labels == {'beta=1.5, layer=("layer1", "a(b)"), weight=0.1', "default", ""}


def test_trade_off_draws_every_method_at_its_means_and_joins_families():
    axes = trade_off_figure(records()).axes[0]
    drawn = {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}
    np.testing.assert_allclose(drawn["trades"], [[91, 52], [95, 40]])
    np.testing.assert_allclose(drawn["trades+vfd"], [[94, 49]])
    assert "clean accuracy" in axes.get_xlabel()
    assert "robust accuracy" in axes.get_ylabel()


def test_curves_and_gallery_have_labelled_axes():
    import torch

    log = [{"epoch": e, "loss": 1 / e, "validation": {"clean": 0.5, "robust": 0.1 * e}} for e in (1, 2, 3)]
    left, right = training_curves({"trades": log}).axes
    assert left.get_xlabel() == right.get_xlabel() == "epoch"
    assert left.get_ylabel() == "training loss"
    x = torch.rand(2, 1, 8, 8)
    figure = gallery({"vanilla": (x, x, ["1 → 7", "2 → 2"])}, amplify=2)
    assert len(figure.axes) == 6
    pictures = figure.axes[4].get_images()[0].get_array()
    assert pictures is not None
    np.testing.assert_allclose(pictures, 0.5)  # no difference is grey
    assert Image.open(io.BytesIO(png(figure))).format == "PNG"


def test_calibration_shows_both_distances_and_the_ratio_of_each_layer():
    def measures(epoch: int, layer: int) -> dict[str, float]:
        return {"distance_clean": epoch + layer, "distance_adv": 2 * epoch + layer, "ratio": 0.1 * epoch}

    layers = ("layer3", "layer4")
    log = [
        {"epoch": epoch, "calibration": {"vfd": {name: measures(epoch, i) for i, name in enumerate(layers)}}}
        for epoch in (1, 2, 3)
    ]
    left, right = calibration_curves({"trades+vfd": log}).axes
    drawn = [np.array(line.get_ydata()) for line in left.lines]
    np.testing.assert_allclose(drawn, [[1, 2, 3], [2, 4, 6], [2, 3, 4], [3, 5, 7]])
    ratios = {line.get_label(): np.array(line.get_ydata()) for line in right.lines}
    assert ratios.keys() == {"trades+vfd, layer3", "trades+vfd, layer4"}
    np.testing.assert_allclose(ratios["trades+vfd, layer4"], [0.1, 0.2, 0.3])
    assert left.get_ylabel() == "distance of features"


def test_missing_paths_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere"):
        report_on([tmp_path / "nowhere"], tmp_path / "page.html")


def test_many_curves_stay_readable():
    log = [{"epoch": e, "loss": 1 / e, "validation": {"clean": 0.5}} for e in (1, 2, 3)]
    figure = training_curves({f"method {i}": log for i in range(30)})
    figure.draw_without_rendering()
    heights = [axes.get_window_extent().height for axes in figure.axes]
    assert min(heights) > 150
    colors = {line.get_color() for line in figure.axes[0].lines}
    assert len(colors) == 30


def test_what_all_attacks_share_stands_in_the_caption():
    members = [f"quantized({each}, bits=8)" for each in ("pgd(steps=20)", "fgsm")]
    names = ["clean", *members, f"worst({', '.join(members)})"]
    table = accuracy_table([replace(RECORD, attack=name) for name in names])
    assert table.columns == ("method", "clean", "pgd(steps=20)", "fgsm", "worst case")
    assert f"; worst case: {names[-1]};" in table.caption
    assert "every attack is quantized to bits=8" in table.caption
    some = accuracy_table([replace(RECORD, attack=name) for name in (*names[:2], "fgsm")])
    assert some.columns == ("method", "clean", members[0], "fgsm")


def test_data_of_one_content_are_one_scope_wherever_they_lie(tmp_path: Path):
    (tmp_path / "moved").mkdir()
    places = [f"folder:{tmp_path / name}" for name in ("gone", "moved")]
    append_records(tmp_path / "r.jsonl", [replace(RECORD, run=f"r{k}", data=each) for k, each in enumerate(places)])
    (scope,) = find_sources([tmp_path / "r.jsonl"]).scopes()
    assert scope.data == places[1]
    append_records(tmp_path / "r.jsonl", [replace(RECORD, run="r2", data=places[0], images="other")])
    assert len(find_sources([tmp_path / "r.jsonl"]).scopes()) == 2
