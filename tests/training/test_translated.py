"""Presets whose authors divide their loss by the number of classes make the authors' steps with our loss."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tests.networks import tiny
from torch import Tensor, nn

from advalign.objectives import Objective, parse
from advalign.training.recipes import RECIPES
from advalign.training.step import Step

CLASSES = 10


def divided(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The KL divergence as the authors write it: `nn.KLDivLoss()`, a mean over images and classes."""
    with torch.no_grad():
        soft = (teacher / temperature).softmax(1)
    return F.kl_div((student / temperature).log_softmax(1), soft, reduction="none").mean()


def ard(s: nn.Module, nets: dict[str, nn.Module], x: Tensor, x_adv: Tensor) -> Tensor:
    return 30.0 * 30.0 * divided(s(x_adv), nets["robust"](x), 30.0)


def rslad(s: nn.Module, nets: dict[str, nn.Module], x: Tensor, x_adv: Tensor) -> Tensor:
    teacher = nets["robust"](x)
    return 5 / 6.0 * divided(s(x_adv), teacher) + 1 / 6.0 * divided(s(x), teacher)


def mtard(s: nn.Module, nets: dict[str, nn.Module], x: Tensor, x_adv: Tensor) -> Tensor:
    return 0.5 * divided(s(x_adv), nets["robust"](x_adv)) + 0.5 * divided(s(x), nets["vanilla"](x))


def adaad(s: nn.Module, nets: dict[str, nn.Module], x: Tensor, x_adv: Tensor) -> Tensor:
    return 1.0 * divided(s(x_adv), nets["robust"](x_adv))


AuthorsLoss = Callable[[nn.Module, dict[str, nn.Module], Tensor, Tensor], Tensor]
# The authors' settings: loss, weight decay, and the epoch, from 0, at which their learning rate of .1 drops first.
LOOPS: dict[str, tuple[str, AuthorsLoss, float, int]] = {
    "ard": ("ard", ard, 2e-4, 100),
    "rslad": ("rslad", rslad, 2e-4, 215),
    "mtard(rate=0)": ("rslad", mtard, 2e-4, 215),
    "adaad": ("adaad", adaad, 5e-4, 100),
}


@pytest.mark.parametrize("method", LOOPS)
def test_the_preset_steps_as_the_authors_loop(method: str):
    preset, loss, weight_decay, drop = LOOPS[method]
    recipe = RECIPES[preset]()
    guests: dict[str, nn.Module] = {
        name: tiny(k, classes=CLASSES).double().eval() for k, name in enumerate(("robust", "vanilla"), 1)
    }
    theirs = tiny(0, classes=CLASSES).double().train()
    before = copy.deepcopy(theirs)
    objective = Objective(parse(method), copy.deepcopy(theirs), guests).train()
    step = Step(objective, recipe, steps=1, device=torch.device("cpu"))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=weight_decay)
    for epoch in range(drop - 3, drop + 2):  # the steps on both sides of the drop, one an epoch
        torch.manual_seed(epoch)
        x, y = torch.rand(8, 3, 8, 8, dtype=torch.double), torch.randint(CLASSES, (8,))
        objective.start_epoch([(x, y)], epoch / recipe.epochs)
        step.schedule(epoch)
        x_adv = step.perturb(x, y, None)
        step.update(x, x_adv, y, None)
        optimizer.param_groups[0]["lr"] = 0.1 if epoch < drop else 0.01
        optimizer.zero_grad()
        loss(theirs, guests, x, x_adv).backward()
        optimizer.step()
    named = dict(objective.student.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(named[name], parameter, rtol=1e-12, atol=1e-12)
        assert not torch.equal(parameter, before.get_parameter(name))
