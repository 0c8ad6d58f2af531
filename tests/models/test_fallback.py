"""Where no folded twin can be made, or it does not work, the network itself runs, and the log says so once."""

from __future__ import annotations

import logging
import threading

import pytest
import torch
from torch import Tensor, nn

from advalign.attacks import PGD
from advalign.evaluation.accuracy import evaluate
from advalign.models import Folded, foldable
from advalign.objectives import compose, total
from advalign.objectives.bases.trades import TRADES
from advalign.threats import Linf


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))


class ReadsItsNorm(Plain):
    """As networks do that compute a scale of their own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.bn.eps)


class KeepsALock(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class KeepsFeatures(Plain):
    """Holds the graph of its last pass, which cannot be copied."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = self.bn(self.conv(x))
        return self.fc(self.last.relu().mean((2, 3)))


class CountsItsNorms(Plain):
    """Gives something else without them."""

    def forward(self, x: Tensor) -> Tensor:
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in self.modules())
        return super().forward(x) + norms * torch.arange(4)


def normed(net: Plain) -> Plain:
    net.conv = nn.utils.weight_norm(net.conv)
    return net


def with_last_features() -> KeepsFeatures:
    net = KeepsFeatures()
    net(torch.rand(2, 3, 8, 8))
    return net


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foldable, "_noted", set())


MAKES = {
    "reads its norm": (ReadsItsNorm, "its copy fails: AttributeError"),
    "keeps a lock": (KeepsALock, "cannot be copied: TypeError"),
    "keeps features": (with_last_features, "cannot be copied: RuntimeError"),
    "counts its norms": (CountsItsNorms, "its copy gives other outputs"),
}


@pytest.mark.parametrize("name", MAKES)
def test_the_network_itself_runs_and_the_log_says_why_once(name: str, caplog: pytest.LogCaptureFixture):
    make, reason = MAKES[name]
    torch.manual_seed(0)
    net, x = make(), torch.rand(5, 3, 8, 8)
    with caplog.at_level(logging.WARNING, "advalign"):
        folded = Folded(net)
        outputs = [folded(x), folded(x), Folded(net)(x)]
        folded.refresh()
        outputs.append(folded(x))
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    net.eval()
    for each in outputs:
        torch.testing.assert_close(each, net(x))
    (line,) = caplog.messages
    assert line.startswith(f"note: {type(net).__name__} runs as it is, without BatchNorm folded into its convolutions")
    assert reason in line


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("make", [*(make for make, _ in MAKES.values()), lambda: normed(Plain())])
def test_such_networks_are_evaluated_and_trained(make):
    torch.manual_seed(0)
    net, x = make(), torch.rand(12, 3, 8, 8)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    attack = PGD(Linf(0.1), steps=3, start="clean")
    broken = net(attack(net, x, y)).argmax(1) != y
    assert 1 - evaluate(net, (x, y), attack).accuracies()[str(attack)] == float(broken.double().mean())
    objective = compose(TRADES(), student=net)
    for _ in range(2):
        total(objective(x, objective.perturb(x, y, Linf(0.1)), y)).backward()
        assert net.fc.weight.grad is not None


def test_a_twin_that_works_is_kept(caplog: pytest.LogCaptureFixture):
    folded = Folded(Plain().eval())
    folded(torch.rand(2, 3, 8, 8))
    assert folded.twin is not folded.net
    assert caplog.messages == []


class Draws(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, training=True)


def test_the_comparison_leaves_the_random_state_and_allows_for_draws(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    folded, x = Folded(Draws()), torch.rand(5, 3, 8, 8)
    before = torch.random.get_rng_state()
    first = folded(x)
    torch.random.set_rng_state(before)
    assert torch.equal(folded(x), first)
    assert caplog.messages == []
