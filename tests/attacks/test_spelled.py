"""Attacks as the user lists them: each once, words for several and for none, one attack in any threat model."""

from __future__ import annotations

import re

import pytest

from advalign.attacks import ATTACKS, STANDARD, parse
from advalign.attacks.spelled import RESERVED, benchmark_of, parse_attacks, remarks_on, rename_attacks
from advalign.errors import UserError
from advalign.threats import L2, Linf

EVERY = [*ATTACKS, *STANDARD, "pgd(steps=3, step_size=0.1)", "worst(fgsm, pgd(steps=3), square(queries=7))"]


def test_each_attack_is_there_once_and_words_stand_for_several_or_none():
    threat = Linf(0.1)
    attacks = parse_attacks(["pgd", "standard", "none", "clean", "pgd(steps=20)", "apgd_ce", "worst(fgsm)"], threat)
    assert [str(attack) for attack in attacks] == [
        "pgd(steps=20)", "fgsm", "mim(steps=20)", 'pgd(steps=100, loss="margin")', "apgd-ce(steps=100)",
    ]  # fmt: skip
    assert all(attack.threat == threat for attack in attacks)
    assert parse_attacks([], threat) == parse_attacks(["none"], threat) == []


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("pdg", "unknown attack 'pdg': did you mean 'pgd'? choose from"),
        ("standrad", "did you mean 'standard'"),
        ("worst", "worst needs attacks, as in 'worst(apgd-ce, square)'"),
        ("none(steps=3)", "unknown attack 'none'"),
        ("worst(standard)", "unknown attack 'standard'"),
    ],
)
def test_what_is_no_attack_is_named(spelling: str, words: str):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_attacks([spelling], Linf())


@pytest.mark.parametrize("spelling", EVERY)
def test_an_attack_in_another_threat_model_is_the_one_spelled_there(spelling: str):
    moved = parse(spelling, threat=Linf(0.1)).with_threat(L2(0.5))
    assert moved == parse(spelling, threat=L2(0.5))
    assert all(member.threat == L2(0.5) for member in moved.members)


def test_names_are_exchanged_in_front_of_their_arguments_and_in_a_worst_case():
    spelling = "worst(a:B, c(x=1), worst(a:B(y=(1, 2)), d))"
    assert rename_attacks(spelling, str.upper) == "worst(A:B, C(x=1), worst(A:B(y=(1, 2)), D))"


def test_no_attack_has_the_name_of_a_word():
    assert not set(RESERVED) & ATTACKS.keys()


def test_a_remark_is_of_an_attack_alone_and_inside_others_but_not_of_other_words():
    for text in ("fast", "worst(pgd(steps=3), fast)", "quantized(fast, bits=8)", "worst(fast,square(queries=1))"):
        assert remarks_on(["fgsm", text])["fast"].startswith("an estimate of autoattack")
    assert not remarks_on(["breakfast", "fast-at at 3", "autoattack", "transfer(pgd, from faster.pt)", "clean"])


def test_a_benchmark_is_of_the_attack_with_its_defaults_in_white_box():
    names = [*map(str, parse_attacks(EVERY, Linf())), "clean", "transfer(autoattack, from at 0)", "mine.pt"]
    assert {name: benchmark_of(name) for name in names if benchmark_of(name)} == {"autoattack": "RobustBench"}
