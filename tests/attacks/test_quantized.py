"""Rounded adversarial images: on the levels, inside the threat model, and nearest there by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.networks import tiny
from torch import Tensor

from advalign.attacks import FGSM, PGD, CarliniWagner, Quantized, Worst, parse
from advalign.attacks.quantized import rounded
from advalign.attacks.spelled import parse_attacks, rename_attacks
from advalign.errors import UserError
from advalign.evaluation.accuracy import WORST_CASE, evaluate
from advalign.evaluation.evaluator import PrecomputedExamples
from advalign.threats import L2, Linf

LEVELS = torch.arange(256, dtype=torch.float64) / 255


def pixels(n: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 8, 8), generator=draw, dtype=torch.uint8)


def on_the_levels(x: Tensor) -> bool:
    return torch.equal((x * 255).round() / 255, x)


@settings(max_examples=30, deadline=None)
@given(eps=st.one_of(st.integers(0, 255).map(lambda k: k / 255), st.floats(0, 1)), seed=st.integers(0, 99))
def test_linf_takes_the_nearest_level_in_the_ball(eps: float, seed: int):
    x = pixels(2, seed) / 255
    torch.manual_seed(seed)
    x_adv = Linf(eps).sample(x)
    inside = (LEVELS - x.double()[..., None]).abs() <= eps + 1e-7
    distance = (LEVELS - x_adv.double()[..., None]).abs()
    nearest = torch.where(inside, distance, torch.inf)
    found = rounded(x_adv, x, Linf(eps), 8)
    assert on_the_levels(found)
    chosen = nearest.gather(-1, (found.double() * 255).round().long()[..., None])[..., 0]
    assert torch.allclose(chosen, nearest.amin(-1), atol=1e-6)  # of two at one distance, either


@settings(max_examples=30, deadline=None)
@given(eps=st.floats(0, 2), seed=st.integers(0, 99))
def test_l2_stays_in_the_ball_one_level_from_the_attack(eps: float, seed: int):
    x = pixels(4, seed) / 255
    torch.manual_seed(seed)
    x_adv = L2(eps).ball(x)((x + eps * L2().steepest(torch.randn_like(x))).clamp(0, 1))
    found = rounded(x_adv, x, L2(eps), 8)
    assert on_the_levels(found)
    assert (L2().distance(found.double(), x.double()) <= eps * (1 + 1e-5) + 1e-6).all()
    assert ((found - x_adv).abs() <= 1 / 255 + 1e-6).all()
    assert ((found - x) * (x_adv - x) >= 0).all()
    plain = (x_adv * 255).round() / 255
    fits = L2().distance(plain.double(), x.double()) <= eps
    assert torch.equal(found[fits], plain[fits])


def test_l2_turns_back_what_was_rounded_by_most():
    """Moves of 1.5, 1.6 and 0.4 levels with a length of 2.23 levels: only one of the first two may be 2."""
    x = torch.full((1, 1, 1, 3), 100 / 255)
    x_adv = x + torch.tensor([1.51, 1.6, -0.4]) / 255
    found = rounded(x_adv, x, L2(2.24 / 255), 8)
    assert ((found - x) * 255).round().flatten().tolist() == [1, 2, 0]
    assert ((rounded(x_adv, x, L2(3 / 255), 8) - x) * 255).round().flatten().tolist() == [2, 2, 0]
    assert ((rounded(x_adv, x, None, 8) - x) * 255).round().flatten().tolist() == [2, 2, 0]


@pytest.mark.parametrize("bits", [8, 16])
def test_clean_images_stay_to_the_bit(bits: int):
    x = pixels(2) / 255
    assert torch.equal(rounded(x, x, Linf(0.1), bits), x)


@pytest.mark.parametrize("threat", [Linf(8 / 255), Linf(7.9 / 255), L2(0.5)], ids=str)
def test_an_attack_is_judged_by_its_rounded_images(threat: Linf | L2):
    net, x = tiny(0).eval(), pixels(64)
    with torch.no_grad():
        y = net(x / 255).argmax(1)
    attack = PGD(threat, steps=5)
    found = evaluate(net, (x, y), attack, quantize=8, keep_examples=True)
    (name,) = found.examples
    assert name == str(Quantized(threat, attack)) == "quantized(pgd(steps=5), bits=8)"
    x_adv = found.examples[name]
    assert on_the_levels(x_adv)
    with torch.no_grad():
        assert torch.equal(found.correct[name], net(x_adv).argmax(1) == y)
    assert found.correct[name].sum() >= evaluate(net, (x, y), attack).correct[str(attack)].sum()


def test_rounding_undoes_an_attack_that_moves_less_than_half_a_level():
    net, x = tiny(0).eval(), pixels(64)
    with torch.no_grad():
        y = net(x / 255).topk(2).indices[:, 0]
    small = FGSM(Linf(0.4 / 255))
    assert evaluate(net, (x, y), small, quantize=8).accuracies()["quantized(fgsm, bits=8)"] == 1
    moved = PrecomputedExamples((x / 255 + 0.4 / 255).clamp(0, 1), Linf(0.4 / 255))
    found = evaluate(net, (x, y), precomputed={"mine": moved}, quantize=8)
    assert found.accuracies()["quantized(mine, bits=8)"] == 1


def test_members_are_rounded_one_by_one():
    threat = Linf(8 / 255)
    worst = parse("quantized(worst(fgsm, pgd(steps=2)), bits=8)", threat=threat)
    assert isinstance(worst, Worst)
    assert str(worst) == "worst(quantized(fgsm, bits=8), quantized(pgd(steps=2), bits=8))"
    assert parse(str(worst), threat=threat) == worst
    auto = parse("quantized(autoattack)", threat=threat)
    assert next(str(member) for member in auto.members) == "quantized(apgd-ce(steps=100), bits=8)"
    assert len(auto.members) == 4
    net, x = tiny(0).eval(), pixels(16)
    with torch.no_grad():
        y = net(x / 255).argmax(1)
    found = evaluate(net, (x, y), [FGSM(threat), PGD(threat, steps=2)], quantize=8)
    assert list(found.correct) == ["clean", "quantized(fgsm, bits=8)", "quantized(pgd(steps=2), bits=8)"]
    assert found.accuracies()[WORST_CASE] <= min(found.accuracies().values())


def test_it_says_of_itself_what_the_attack_says():
    inner = [PGD(Linf()), CarliniWagner(Linf()), parse("square", threat=Linf()), parse("fab", threat=Linf())]
    for attack in inner:
        wrapped = Quantized(Linf(), attack)
        for word in ("bounded", "transfers", "uses_gradients"):
            assert getattr(wrapped, word) == getattr(attack, word)
    whole = Quantized(Linf(), PGD(Linf())).to_the_end
    assert str(whole) == f"quantized({PGD(Linf()).to_the_end}, bits=8)"
    assert Quantized(Linf(), PGD(Linf())).with_threat(L2(1.0)).members[0].threat == L2(1.0)


def test_spellings_are_read_and_renamed():
    (attack,) = parse_attacks(["quantized(pgd(steps=3), bits=4)"], Linf())
    assert (str(attack), attack) == ("quantized(pgd(steps=3), bits=4)", Quantized(Linf(), PGD(Linf(), steps=3), 4))
    renamed = rename_attacks("quantized(my_file:Mine(steps=3), bits=4)", lambda name: name.partition(":")[2].lower())
    assert renamed == "quantized(mine(steps=3), bits=4)"


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("quantized", "quantized needs an attack, as in"),
        ("quantized()", "unknown attack ''|cannot read"),
        ("quantized(pgd, bit=8)", r"write it as in quantized\(pgd\(steps=20\), bits=8\)"),
        ("quantized(pgd, bits=8, bits=9)", "write it as in"),
        ("quantized(pgd, fgsm)", "write it as in"),
        ("quantized(pgd, bits=0)", "bits=0 must be in 1 to 16"),
        ("quantized(pgd, bits=17)", "bits=17 must be in 1 to 16"),
        ("quantized(pgdd)", "unknown attack 'pgdd'.*did you mean 'pgd'"),
    ],
)
def test_wrong_spellings_are_refused(spelling: str, message: str):
    with pytest.raises(UserError, match=message):
        parse_attacks([spelling], Linf())


def test_images_between_levels_are_refused_before_the_attacks():
    x, calls = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), []
    x[0] = x[0].mul(255).round().div(255)

    def count(*_: Any) -> None:
        calls.append(1)

    net = tiny(0).eval()
    net.register_forward_hook(count)
    for bits, message in [(8, "3 of 4 clean images .* 1/255"), (0, "bits=0 must be in 1 to 16")]:
        with pytest.raises(UserError, match=message):
            evaluate(net, (x, torch.zeros(4, dtype=torch.int64)), FGSM(Linf(0.1)), quantize=bits)
    assert not calls
