"""Networks as users write them: shared weights, other numeric types, nothing to train, two outputs in train mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.runs import load
from advalign.training.recipes import digits
from advalign.training.train import train

QUICK = replace(digits(), epochs=2, steps=1, batch_size=64, subset=128, validation=32)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.Linear(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class Shared(Small):
    """One module under two names, one weight in two modules, and a view of a weight as a buffer."""

    first: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.again, self.other = self.norm, nn.Linear(6, 10)
        self.other.weight = self.fc.weight
        self.register_buffer("first", torch.arange(12.0).view(2, 6)[1])

    def forward(self, x: Tensor) -> Tensor:
        features = self.again(self.conv(x)).relu().mean((2, 3))
        return self.fc(features) + self.other(features * self.first)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = Small()

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        logits = self.net(x)
        return (logits, logits) if self.training else logits


class InPlace(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5).div_(0.5))


class Scaled(Small):
    """Whose copy with folded norms fails."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + self.norm.eps)


def half() -> nn.Module:
    return Small().bfloat16()


def double() -> nn.Module:
    return Small().double()


def frozen() -> nn.Module:
    return Small().requires_grad_(False)


@pytest.mark.parametrize("name", ["Shared", "InPlace", "Scaled", "half", "double"])
def test_they_are_trained_saved_loaded_and_measured(name: str, tmp_path: Path):
    model = f"{__name__}:{name}"
    run = train("trades", data="digits", model=model, recipe=QUICK, runs=tmp_path, device="cpu")
    assert run.finished
    net = load(run.path, "last", trust_model=True)
    norm = net.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked > 0
    options = TargetOptions(n=16, device="cpu", trust_model=True)
    measured = measure(run.path, ["pgd(steps=2)"], options, save_examples=True)
    assert measured.examples_path.exists()


def test_weights_that_are_shared_are_so_again_after_loading(tmp_path: Path):
    run = train("natural", data="digits", model=f"{__name__}:Shared", recipe=QUICK, runs=tmp_path, device="cpu")
    net = load(run.path, "last", trust_model=True)
    assert net.get_parameter("fc.weight") is net.get_parameter("other.weight")
    assert net.get_submodule("again") is net.get_submodule("norm")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frozen", "frozen has no weight to train: requires_grad is off for every parameter"),
        ("TwoOutputs", "the model must return logits, a tensor (N, K), not tuple in train mode"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_work(name: str, words: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        train("at", data="digits", model=f"{__name__}:{name}", recipe=QUICK, runs=tmp_path, device="cpu")
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())
