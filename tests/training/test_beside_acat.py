"""Presets `acat` and `dajat` beside the authors' loop in plain PyTorch: ramp, attack, AWP by a proxy, SGD, average.

Theirs is val-iisc/DAJAT: with `--num_auto 0` it is ACAT. They count epochs from 1; the learning rate moves once an
epoch, as here where an epoch is one step. Two things are as in our code, and not in theirs: AWP climbs the loss of the
smoothed labels, and the average starts with a copy of the weights, where theirs follows them for one more step.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.networks import tiny
from torch import Tensor, nn

from advalign.objectives import Objective, parse
from advalign.training.averaging import Average
from advalign.training.recipes import RECIPES
from advalign.training.step import Step

EPOCHS, BETA, CLASSES = 8, 9.0, 10


Batch = tuple[list[Tensor], Tensor, Tensor]
"""The augmentations of the images, their labels, and the noise that their attacks start with."""


def train(nets: list[nn.Module], smoothing: float, batches: list[Batch]) -> dict[str, Tensor]:
    """Run the authors' loop; networks that share convolutions, one for each kind of norm. Return the average."""
    base = nets[0]
    parameters = {id(p): p for net in nets for p in net.parameters()}.values()
    optimizer = torch.optim.SGD(parameters, lr=0.2, momentum=0.9, weight_decay=5e-4)
    average: dict[str, Tensor] = {}
    for epoch, (views, y, noise) in enumerate(batches, 1):
        optimizer.param_groups[0]["lr"] = 0.2 * 0.5 * (1 + math.cos((epoch - 1) / EPOCHS * math.pi))
        eps = 8 / 255 * epoch / EPOCHS
        of = [nets[min(k, 1)] for k in range(len(views))]
        attacked = [attack(net, x, n, eps) for net, x, n in zip(of, views, noise.chunk(len(views)), strict=True)]
        moved: dict[str, Tensor] = {}
        if epoch >= 3:
            proxy = copy.deepcopy(base).train()
            ascent = torch.optim.SGD(proxy.parameters(), lr=0.2)
            (-tradeoff(proxy, views[0], attacked[0], y, smoothing)[0]).backward()
            ascent.step()
            for (name, old), new in zip(base.named_parameters(), proxy.parameters(), strict=True):
                if old.ndim > 1:
                    step = (new - old).detach()
                    moved[name] = 0.005 * old.norm().detach() / (step.norm() + 1e-20) * step
        shift(base, moved, 1)
        results = [tradeoff(net.train(), x, a, y, smoothing) for net, x, a in zip(of, views, attacked, strict=True)]
        loss = torch.stack([loss for loss, _ in results]).mean()
        if len(views) > 1:
            mixture = torch.clamp(torch.stack([p for _, p in results]).mean(0), 1e-7, 1).log()
            js = torch.stack([F.kl_div(mixture, p, reduction="batchmean") for _, p in results]).mean()
            loss = loss + 2 * js
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        shift(base, moved, -1)
        for name, value in base.named_parameters():
            if epoch <= 4:
                average[name] = value.detach().clone()
            else:
                average[name] = (1 - 0.9996) * value.detach() + 0.9996 * average[name]
    return average


def attack(net: nn.Module, x: Tensor, noise: Tensor, eps: float) -> Tensor:
    net.eval()
    x_adv = x + 0.001 * noise
    for _ in range(2):
        x_adv.requires_grad_()
        loss = F.kl_div(F.log_softmax(net(x_adv), 1), F.softmax(net(x), 1), reduction="sum")
        x_adv = x_adv.detach() + eps * torch.autograd.grad(loss, [x_adv])[0].sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0.0, 1.0)
    return x_adv


def tradeoff(net: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """TRADES with their labels: 1 - smoothing for the class, and smoothing / (K - 1) for each other."""
    z, z_adv = net(x), net(x_adv)
    target = torch.full_like(z, smoothing / (CLASSES - 1)).scatter_(1, y[:, None], 1 - smoothing)
    natural = -(target * z.log_softmax(1)).sum(1).mean()
    robust = F.kl_div(z_adv.log_softmax(1), z.softmax(1), reduction="batchmean")
    return natural + BETA * robust, z.softmax(1)


@torch.no_grad()
def shift(net: nn.Module, by: dict[str, Tensor], sign: int) -> None:
    for name, parameter in net.named_parameters():
        if name in by:
            parameter.add_(sign * by[name])


@pytest.mark.parametrize(("preset", "method"), [("acat", ""), ("dajat", "+dajat(copies=1)")])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_preset_steps_as_the_authors_loop(preset: str, method: str, smoothing: float):
    base = tiny(0, classes=CLASSES).double().train()
    auto = copy.deepcopy(base)
    shared = {name: p for name, p in base.named_parameters() if not name.split(".")[-2].isdigit() or p.ndim > 1}
    for name, parameter in shared.items():
        owner, _, attribute = name.rpartition(".")
        setattr(auto.get_submodule(owner), attribute, parameter)
    recipe = replace(
        RECIPES[preset](), epochs=EPOCHS, awp_start=2, average_start=0.5, steps=2, step_size=8 / 255,
        label_smoothing=CLASSES / (CLASSES - 1) * smoothing,
    )  # fmt: skip
    objective = Objective(parse(f"trades(beta=9){method}"), copy.deepcopy(base), {}, recipe.label_smoothing).train()
    step = Step(objective, recipe, steps=1, device=torch.device("cpu"))
    average = Average(objective, recipe, steps=1)
    batches: list[Batch] = []
    for epoch in range(6):
        torch.manual_seed(epoch)
        views = [torch.rand(8, 3, 8, 8, dtype=torch.double) for _ in range(2 if method else 1)]
        y = torch.randint(CLASSES, (8,))
        second = views[1] if method else None
        torch.manual_seed(epoch)
        batches.append((views, y, torch.randn_like(torch.cat(views))))
        torch.manual_seed(epoch)
        step.start_epoch(epoch)
        step.schedule(epoch)
        step.update(views[0], step.perturb(views[0], y, second), y, second)
        average.update(epoch + 1)
    expected = train([base, auto], smoothing, batches)
    names = {name.replace(".first.", "."): name for name, _ in objective.student.named_parameters()}
    found = dict(objective.student.named_parameters())
    averaged = dict(zip(found, average.weights, strict=True))
    for name, parameter in base.named_parameters():
        torch.testing.assert_close(found[names[name]], parameter, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(averaged[names[name]], expected[name], rtol=1e-10, atol=1e-10)
    for name, parameter in auto.named_parameters():
        own = names[name].replace(".first.", ".others.")
        if method:
            torch.testing.assert_close(found[own], parameter, rtol=1e-10, atol=1e-10)
