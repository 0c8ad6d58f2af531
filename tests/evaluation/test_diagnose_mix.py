"""A mix whose attack sees only one of its networks is caught by examples made on the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.networks import Target
from torch import Tensor, nn

from advalign import models
from advalign.data import Batches, load
from advalign.evaluation.checks import check_floor, check_members
from advalign.evaluation.diagnose import Diagnosis, diagnose
from advalign.evaluation.diagnose_mix import mix_verdicts
from advalign.models.mix import Mix
from advalign.runtime.seeds import seeded
from advalign.threats import Linf

THREAT = Linf(0.2)


@pytest.fixture(scope="module")
def accurate() -> nn.Module:
    net = models.build("small-cnn(width=4)", classes=10, channels=1)
    with seeded("accurate"):
        net.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Conv2d | nn.Linear) else None)
        optimizer = torch.optim.SGD(net.parameters(), 0.2, momentum=0.9)
        for epoch in range(3):
            for x, y in Batches(load("digits").train, 64, augment="none", seed=0).epoch(epoch):
                nn.functional.cross_entropy(net(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
    return net.eval()


@pytest.fixture(autouse=True)
def less_effort(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("advalign.evaluation.diagnose.QUERIES", 50)
    monkeypatch.setattr("advalign.evaluation.diagnose.RESTARTS", 2)


def look(net: nn.Module, target: Target, n: int = 60) -> Diagnosis:
    return diagnose(net.eval(), (target.x[:n], target.y[:n]), THREAT, n=n)


@pytest.mark.slow
def test_a_mix_has_verdicts_of_its_own_and_an_honest_one_passes(target: Target, accurate: nn.Module):
    diagnosis = look(Mix(target.model, accurate, 0.7, 0.5), target)
    assert diagnosis["members"].passed == "pass", diagnosis["members"]
    assert diagnosis["logits"].passed == "pass"
    assert diagnosis["floor"].passed != "fail"
    assert not diagnosis.failed
    with pytest.raises(StopIteration):
        look(target.model, target, n=10)["members"]


@pytest.mark.slow
def test_a_member_without_a_gradient_is_found_by_examples_made_on_it(target: Target, accurate: nn.Module):
    """At this weight the accurate member decides; the attack on the mix follows the robust one alone."""
    x, y = target.x[:100], target.y[:100]
    mix = Mix(target.model, accurate, 0.5, 0.2).eval()
    white = mix(x).argmax(1) == y  # an attack that is led astray and breaks nothing

    def withstand(name: str, attack: Any, among: Tensor | None) -> Tensor:
        assert among is not None
        return among & (mix(attack(mix, x, y)).argmax(1) == y)

    members, floor = mix_verdicts(mix, x, y, THREAT, white, withstand)
    assert members.passed == "fail"
    assert members.number > 20
    assert "hides the other" in members.sentence
    assert floor.name == "floor"


def test_the_floor_is_counted():
    kept = torch.arange(200) < 120
    certain, none = torch.arange(200) < 60, torch.zeros(200, dtype=torch.bool)
    doubt = check_floor(kept, certain, none)
    assert (doubt.passed, doubt.number) == ("warn", pytest.approx(30))
    assert check_floor(kept, certain, torch.arange(200) < 60).passed == "pass"  # the accurate one withstands as well
    assert check_floor(kept, kept, none).passed == "pass"


def test_what_examples_of_members_break_is_counted():
    white = torch.arange(200) < 120
    assert check_members(white, torch.arange(200) < 119).passed == "pass"
    assert check_members(white, torch.arange(200) < 90).passed == "fail"
    assert check_members(white, torch.arange(200) < 114).passed == "warn"
