"""RobustBench's card: what the records say in its words, and no card without its attack."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.samples import RECORD

from advalign.errors import UserError
from advalign.report.card import card_attack, robustbench_card


def test_the_card_is_of_the_clean_images_and_autoattack():
    records = [
        replace(RECORD, accuracy=0.875),
        replace(RECORD, attack="fgsm", accuracy=0.6),
        replace(RECORD, attack="autoattack", accuracy=0.51234),
        replace(RECORD, attack="worst(fgsm, autoattack)", accuracy=0.5),
    ]
    assert card_attack(records) is records[2]
    card = robustbench_card(records, extra_data=True)
    assert {key: value for key, value in card.items() if value is not None} == {
        "name": "trades", "additional_data": True, "number_forward_passes": 1, "dataset": "digits",
        "architecture": "small-cnn", "threat_model": "Linf", "eps": "0.2", "clean_acc": "87.50",
        "autoattack_acc": "51.23", "footnote": "500 test images, checkpoint best; commit  of advalign",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("model", "passes"),
    [
        ('mix(robust="resnet18", accurate="vgg16", weight=0.9)', 2),
        ("mix(robust=\"mix(robust='vgg16', accurate='vgg16', weight=0.9)\", accurate=\"vgg16\", weight=0.9)", 3),
        ("nets.own:mix()", 1),
        ("nets.own:remix()", 1),
    ],
)
def test_a_mix_costs_a_pass_of_each_network(model: str, passes: int):
    records = [replace(RECORD, model=model), replace(RECORD, model=model, attack="autoattack")]
    assert robustbench_card(records, extra_data=False)["number_forward_passes"] == passes


def test_without_its_attack_there_is_no_card():
    records = [RECORD, replace(RECORD, attack="transfer(autoattack, from natural 0)")]
    assert card_attack(records) is None
    with pytest.raises(UserError, match="RobustBench's card needs an evaluation with --attacks autoattack"):
        robustbench_card(records, extra_data=False)
