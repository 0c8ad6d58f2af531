"""What masks its gradient is caught, and by the verdict that is meant to; honest networks are not accused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.networks import Around
from torch import Tensor, nn

from advalign import models
from advalign.cli import commands as cli
from advalign.data import Batches, Images, load
from advalign.errors import UserError
from advalign.evaluation import checks
from advalign.evaluation.diagnose import Diagnosis, _radii, diagnose
from advalign.runtime.seeds import seeded
from advalign.threats import L2, Linf
from advalign.training.recipes import digits
from advalign.training.train import train

N = 100


@pytest.fixture(autouse=True)
def less_effort(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("advalign.evaluation.diagnose.QUERIES", 150)
    monkeypatch.setattr("advalign.evaluation.diagnose.RESTARTS", 3)


@pytest.fixture(scope="module")
def test_images() -> Images:
    return load("digits").test


@pytest.fixture(scope="module")
def natural() -> nn.Module:
    """Digits without an attack: 98 % clean, nothing at Linf(.2)."""
    return _fitted(models.build("small-cnn(width=8)", classes=10, channels=1), epochs=8, lr=0.1)


def _fitted(net: nn.Module, *, epochs: int, lr: float, temperature: float = 1) -> nn.Module:
    batches = Batches(load("digits").train, 64, augment="none", seed=0)
    with seeded("natural"):
        net.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Conv2d | nn.Linear) else None)
        optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9)
        for epoch in range(epochs):
            for x, y in batches.epoch(epoch):
                F.cross_entropy(net(x) / temperature, y).backward()
                optimizer.step()
                optimizer.zero_grad()
    return net.eval()


def _resized(x: Tensor) -> Tensor:
    """Xie et al. 2018: random size, random padding."""
    size = int(torch.randint(6, 8, ()))
    left, top = (int(torch.randint(0, 9 - size, ())) for _ in range(2))
    return F.pad(F.interpolate(x, size=size, mode="bilinear"), (left, 8 - size - left, top, 8 - size - top))


def _look(net: nn.Module, images: Images, **options) -> Diagnosis:
    return diagnose(net.eval(), images, Linf(0.2), n=N, **options)


@pytest.mark.parametrize("robust", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_honest_networks_pass(robust: bool, request: pytest.FixtureRequest, natural: nn.Module, test_images: Images):
    net = request.getfixturevalue("target").model if robust else natural
    diagnosis = diagnose(net, test_images, Linf(0.2), n=N)
    assert not diagnosis.failed, [v.sentence for v in diagnosis.verdicts if v.passed == "fail"]


@pytest.mark.slow
def test_honest_networks_pass_in_l2(target, test_images: Images):
    linear = _fitted(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), epochs=8, lr=0.01)
    for net, threat in ((target.model, L2(0.5)), (linear, L2(1.0))):
        diagnosis = diagnose(net, test_images, threat, n=N)
        assert not diagnosis.failed, [v.sentence for v in diagnosis.verdicts if v.passed == "fail"]


@pytest.mark.slow
def test_honest_networks_pass_on_images_that_they_classify_and_at_other_radii(target, natural: nn.Module):
    for net, eps in ((target.model, 0.4), (natural, 1 / 255)):
        assert not diagnose(net, (target.x, target.y), Linf(eps), n=N).failed


MASKERS: dict[str, tuple[Callable, Callable, set[str]]] = {
    "saturated logits": (lambda x: x, lambda z: z * 1e4, {"gradient", "large radius", "loss"}),
    "distillation, simulated": (lambda x: x, lambda z: z * 100, {"gradient", "large radius", "loss"}),
    "quantised input": (lambda x: (x * 8).round() / 8, lambda z: z, {"gradient", "large radius", "random noise"}),
    "no graph": (lambda x: x.detach(), lambda z: z.detach(), {"gradient"}),
    "reversed gradient": (lambda x: 2 * x.detach() - x, lambda z: z, {"large radius", "random noise", "black box"}),
    "random resizing and padding": (_resized, lambda z: z, {"determinism"}),
    "dropout that stays": (lambda x: F.dropout(x, 0.3), lambda z: z, {"determinism"}),
    "softmax": (lambda x: x, lambda z: z.softmax(1), {"logits"}),
    "statistics of the batch": (lambda x: x, lambda z: z - z.mean(0), {"batch"}),
}
QUICKLY_CAUGHT = ("no graph", "random resizing and padding", "softmax")


@pytest.mark.parametrize(
    "name", [name if name in QUICKLY_CAUGHT else pytest.param(name, marks=pytest.mark.slow) for name in MASKERS]
)
def test_maskers_are_caught(name: str, natural: nn.Module, test_images: Images):
    before, after, caught = MASKERS[name]
    assert caught <= set(_look(Around(natural, before, after), test_images).failed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "caught"),
    [
        ("saturated logits", {"gradient", "large radius", "loss"}),
        ("distillation, simulated", {"gradient", "loss"}),
        ("quantised input", {"gradient", "large radius", "black box"}),
    ],
)
def test_maskers_on_a_robust_network_are_caught(name: str, caught: set[str], target, test_images: Images):
    """There is less to hide: noise and the black box find little.

    At a scale of 50 the verdict on the loss is so near its threshold that rounding in the training of the network
    decides it; at 100 it is clear.
    """
    before, after, _ = MASKERS[name]
    assert caught <= set(diagnose(Around(target.model, before, after).eval(), test_images, Linf(0.2), n=200).failed)


@pytest.mark.slow
def test_defensive_distillation_is_caught(test_images: Images):
    """Papernot et al. 2016: trained at a high temperature, deployed at 1."""
    net = models.build("small-cnn(width=8)", classes=10, channels=1)
    diagnosis = _look(_fitted(net, epochs=20, lr=2.0, temperature=50), test_images)
    assert diagnosis.by_radius[0] > 0.8
    assert {"gradient", "loss"} <= set(diagnosis.failed)


@pytest.mark.slow
def test_log_probabilities_are_a_warning(natural: nn.Module, test_images: Images):
    diagnosis = _look(Around(natural, after=lambda z: z.log_softmax(1)), test_images)
    assert not diagnosis.failed
    assert diagnosis["logits"].passed == "warn"


@pytest.mark.slow
def test_train_mode_is_named_and_the_rest_done_in_eval_mode(natural: nn.Module, test_images: Images):
    net = copy.deepcopy(natural)
    late = next(name for name, module in net.named_modules() if isinstance(module, nn.BatchNorm2d))
    net.get_submodule(late).train()
    diagnosis = diagnose(net, test_images, Linf(0.2), n=N)
    assert diagnosis.failed == ["eval mode"]
    assert late in diagnosis["eval mode"].sentence
    assert diagnosis["eval mode"].number == 1
    assert net.get_submodule(late).training  # as it was


@pytest.mark.parametrize("x", [torch.rand(20, 1, 8, 8) * 2 - 1, torch.full((20, 1, 8, 8), torch.nan)])
def test_images_outside_the_range_end_it(natural: nn.Module, x: Tensor):
    diagnosis = diagnose(natural, (x, torch.arange(20) % 10), Linf(0.2))
    assert diagnosis.failed == ["input range"]
    assert not diagnosis.by_steps
    json.dumps(diagnosis.content(), allow_nan=False)


@pytest.mark.slow
def test_transfer_breaks_what_a_reversed_gradient_hides(natural: nn.Module, test_images: Images, monkeypatch):
    monkeypatch.setattr("advalign.evaluation.diagnose.QUERIES", 1)
    liar = Around(natural, MASKERS["reversed gradient"][0])
    alone, helped = (
        _look(liar, test_images)["black box"],
        _look(liar, test_images, surrogate=natural)["black box"],
    )
    assert alone.number < 50 < helped.number
    assert helped.passed == "fail"
    assert "transfer broke" in helped.sentence


@pytest.mark.slow
def test_a_model_that_guesses_is_a_warning(test_images: Images):
    with seeded("guess"):
        net = models.build("small-cnn(width=4)", classes=10, channels=1)
    assert _look(net, test_images)["clean accuracy"].passed == "warn"


@pytest.mark.slow
def test_everything_is_left_as_it_was(natural: nn.Module, test_images: Images):
    net = Around(natural, lambda x: F.dropout(x, 0.1))
    net.train()
    natural.eval()
    next(net.parameters()).grad = torch.ones_like(next(net.parameters()))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.get_rng_state()
    x, y = test_images.floats(), test_images.labels
    kept = x.clone()
    diagnose(net, (x, y), Linf(0.2), n=40)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert (net.training, natural.training) == (True, False)
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert [parameter.grad is None for parameter in net.parameters()] == [False] + [True] * (
        len(list(net.parameters())) - 1
    )
    next(net.parameters()).grad = None


@pytest.mark.slow
def test_the_same_twice(natural: nn.Module, test_images: Images):
    assert _look(natural, test_images).content() == _look(natural, test_images).content()


def test_the_test_of_a_difference_is_mcnemars():
    from scipy.stats import binomtest

    high, low = torch.ones(100, dtype=torch.bool), torch.ones(100, dtype=torch.bool)
    for lost, gained in ((9, 0), (10, 0), (20, 5), (40, 15), (5, 20)):
        low[:], high[:] = True, True
        low[:lost], high[lost : lost + gained] = False, False
        exact = binomtest(lost, lost + gained, alternative="greater").pvalue
        assert checks.tail(lost, lost + gained, 0.5) == pytest.approx(exact)
        assert checks.clearly_below(low, high) == (exact < checks.ALPHA)


def test_radii_end_where_everything_can_be_reached():
    x = torch.zeros(2, 3, 4, 4)
    assert _radii(Linf(0.25), x) == [0.0625, 0.125, 0.25, 0.5, 1.0]
    assert _radii(L2(2.0), x)[-1] == pytest.approx(48**0.5)
    assert _radii(Linf(1.0), x) == [0.25, 0.5, 1.0]


@pytest.mark.slow
def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    quick = replace(digits(), epochs=2, steps=1, batch_size=128)
    run = train("at", data="digits", model="small-cnn(width=4)", recipe=quick, runs=tmp_path, device="cpu")
    cli.main(["diagnose", str(run.path), "-n", "60", "--device", "cpu", "--seed", "1"])
    shown = capsys.readouterr().out
    assert "random noise" in shown
    (file,) = (run.path / "diagnosis").glob("*.json")
    content = json.loads(file.read_text())
    assert content["n"] == 60
    assert content["threat"] == "Linf(0.2)"
    assert {verdict["passed"] for verdict in content["verdicts"]} <= {"pass", "warn", "fail"}
    page = file.with_suffix(".html").read_text()
    assert page.count("<svg ") == 2
    assert "standard deviation over seeds" not in page  # that note is for tables of accuracies
    with pytest.raises(SystemExit, match="2"):
        cli.main(["diagnose", str(run.path), "--device", "cpu", "-n", "0"])
    assert "n=0 must be at least 1" in capsys.readouterr().err


def test_verdicts_do_not_contradict_their_numbers():
    """Digits with a quantised input: noise broke 8 images, PGD 2, and the verdict was a plain pass."""
    right = torch.ones(100, dtype=torch.bool)
    noise, pgd = right.clone(), right.clone()
    noise[:8], pgd[:2] = False, False
    warned = checks.check_noise(noise, pgd, right)
    assert (warned.passed, str(warned)) == ("warn", "400.0 % of PGD")
    assert warned.advice
    noise[4:] = True
    verdict = checks.check_noise(noise, pgd, right)
    assert verdict.passed == "pass"
    assert "too few to tell" in verdict.sentence
    assert verdict.advice == ""

    usual, more = right.clone(), right.clone()
    more[:2] = False
    chance = checks.check_convergence({20: usual, 100: more}, usual, usual)
    assert (chance.passed, str(chance)) == ("pass", "2.0 points")
    assert "may be chance" in chance.sentence
    more[:12] = False
    assert checks.check_convergence({20: usual, 100: more}, usual, usual).passed == "warn"


def test_numbers_say_what_they_count():
    x = torch.rand(4, 1, 2, 2) * 0.5 + 0.25
    assert str(checks.check_range(x)) == "0 beyond [0, 1]"
    assert str(checks.check_determinism(x.flatten(1), x.flatten(1))) == "0 of the outputs' spread"


def test_every_check_has_its_advice(natural: nn.Module, test_images: Images):
    names = {verdict.name for verdict in diagnose(natural, test_images, Linf(0.2), n=20).verdicts}
    assert names | {"members", "floor"} == checks.ADVICE.keys()  # these two of mixes alone


def test_what_is_no_logits_is_refused(natural: nn.Module, test_images: Images):
    with pytest.raises(UserError, match="must return logits"):
        _look(Around(natural, after=lambda z: z[:, 0]), test_images)
    with pytest.raises(UserError, match="not finite on 100 of 100 clean images"):
        _look(Around(natural, after=lambda z: z * torch.nan), test_images)
