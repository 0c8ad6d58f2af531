"""What a step costs, counted, against what the formulas say; and the list that shows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from advalign.cli.listing import methods
from advalign.objectives import BASES, PLUGINS, parse
from advalign.objectives.passes import count_passes


@pytest.mark.parametrize(
    ("method", "forward", "backward"),
    [
        ("natural", 1, 1),
        ("at", 11, 11),  # ten steps and the loss
        ("trades", 13, 12),  # the clean prediction once more, without gradient
        ("hat", 14, 13),
        ("contrast", 15, 13),  # the clean features of both views without gradient, then with it
        ("afa", 1, 0),  # the last layer alone learns
        ("at+vfd", 12, 12),  # the clean features
        ("at+generalist", 11, 11),  # the natural learner is another network
        ("trades+rebat", 14, 12),  # the average on x', without gradient
        ("trades+consistency", 26, 24),  # everything on two augmentations
        ("trades+dajat", 39, 36),  # on three
        ("at+dajat(copies=1)", 24, 24),  # and once clean
        ("trades+part", 14, 13),  # the gradient of the map
    ],
)
def test_passes_are_those_of_the_formula(method: str, forward: int, backward: int):
    state = torch.get_rng_state()
    assert count_passes(parse(method)) == (forward, backward)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_the_list_shows_what_each_part_needs_and_costs():
    rows = dict(methods())
    assert rows["hat"].endswith("2022. [vanilla model, 14 forward, 13 backward passes]")
    assert rows["+vfd"].endswith("[vanilla model, on trades +0 forward, +0 backward]")
    assert rows["+igdm"].endswith("[robust model, on trades +1 forward, +1 backward]")
    assert rows["+consistency"].endswith("[second view, on trades +13 forward, +12 backward]")


@pytest.mark.parametrize("part", [*BASES.values(), *PLUGINS.values()])
def test_the_first_line_names_a_paper_and_its_year(part: type):
    assert re.search(r"[A-Z][a-z]+( et al\.| and [A-Z][a-z]+)? (19|20)\d\d", (part.__doc__ or "").partition("\n")[0])


@pytest.mark.parametrize("name", [*BASES, *PLUGINS])
def test_the_page_says_what_batchnorm_sees(name: str):
    page = Path(__file__).parents[2] / "docs" / "methods" / f"{'afa' if name == 'contrast' else name}.md"
    assert "BatchNorm" in page.read_text()
