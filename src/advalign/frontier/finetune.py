"""The dial of robust critical fine-tuning: one layer tuned on clean images, and a mean of the weights before and after.

RiFT: Zhu, Hu, Wang, Xie, Yang 2023 (ICCV, arXiv 2308.02533). The layer is the one whose weights matter least to the
loss on adversarial images. No accurate network is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from advalign.attacks import parse
from advalign.attacks.classification import classified, in_fp32
from advalign.data import Batches, Images
from advalign.errors import UserError
from advalign.frontier.members import Material, setting_of
from advalign.frontier.weights import WeightSpace
from advalign.models.adapted import adapted
from advalign.models.modes import evaluating
from advalign.runs.checkpoint import load_into, load_weights, save_weights
from advalign.runtime.files import digest
from advalign.runtime.progress import say
from advalign.runtime.seeds import seeded
from advalign.threats import Threat
from advalign.training.recipes import Recipe

ATTACK = "pgd(steps=10, until_fooled=False)"
"""Makes the adversarial images on which layers are compared."""
ASCENT_EPOCHS, ASCENT_RATE, RADIUS = 10, 1.0, 0.1
"""Of the search for the worst change of a layer's weights, of a norm of at most `RADIUS` times theirs."""
EPOCHS, RATE, MOMENTUM, DECAY, BATCH = 10, 1e-3, 0.9, 5e-4, 128
"""Of the tuning; the rate falls to a tenth after half of the epochs."""
_BATCH_OF_ASCENT = 512


def fine_tune(material: Material) -> WeightSpace:
    """RiFT: average a robust network's weights with those of a copy, one layer of which is tuned on clean images.

    The copy is kept in the result's folder.

    Raises:
        UserError: there are no training images, or the network has no layer to tune.
    """
    robust, training, held_out = material.members[0], material.training, material.held_out
    content = (robust.digest, robust.part, robust.model, robust.threat, material.options.seed)
    name = digest(repr(content), training.digests.tobytes(), held_out.digests.tobytes(), digits=10)
    file = material.folder / f"tuned-{name}.safetensors"
    if not file.is_file():
        criticality = criticalities(robust.net, held_out, robust.threat, material.options.seed)
        layer = choose_layer(criticality)
        say(material.console, f"tuning {layer}, the least critical of {len(criticality)} layers")
        augment = setting_of(robust).get("recipe", {}).get("augment", Recipe().augment)
        batches = Batches(training, BATCH, augment=augment, seed=material.options.seed)
        card = {
            "method": f"finetune({robust.method})",
            "model": robust.model,
            "layer": layer,
            "criticality": criticality,
        }
        card |= {key: robust.card[key] for key in ("data", "classes", "channels", "shape") if key in robust.card}
        save_weights(file, tuned(robust.net, layer, batches, held_out), card)
    stored, card = load_weights(file)
    net = copy.deepcopy(robust.net)
    load_into(net, stored, str(file))
    return WeightSpace("finetune", (robust.net, net.eval()), None, {"layer": card["layer"]})


def criticalities(net: nn.Module, held_out: Images, threat: Threat, seed: int) -> dict[str, float]:
    """Return each layer's robust criticality: how much a change of its weights can raise the loss on attacked images.

    The change is found by gradient ascent over the images, with BatchNorm's statistics as they are, and is projected
    to 0.1 of the weights' Frobenius norm after every step (the authors project once an epoch).

    Args:
        net: in eval mode.
        held_out: images that it was not trained on; it is attacked on them.
    """
    with in_fp32(held_out.labels.device):
        attacked = _attacked(net, held_out, threat, seed)
        mine = copy.deepcopy(net).eval().requires_grad_(False)
        start = _loss(mine, attacked)
        return {name: _worst_loss(mine, name, attacked, start) - start for name in _layers(net)}


def _layers(net: nn.Module) -> list[str]:
    """Return the names of the convolutions and linear layers whose weights are parameters of their own."""
    kinds = (_ConvNd, nn.Linear)
    return [n for n, module in net.named_modules() if isinstance(module, kinds) and "weight" in module._parameters]


def _attacked(net: nn.Module, images: Images, threat: Threat, seed: int) -> list[tuple[Tensor, Tensor]]:
    attack = parse(ATTACK, threat=threat)
    made = []
    with seeded(seed, "criticality"), evaluating(net):
        for rows in torch.arange(len(images), device=images.labels.device).split(_BATCH_OF_ASCENT):
            x, y = images.floats(rows), images.labels[rows]
            made.append((attack(net, x, y), y))
    return made


def _worst_loss(net: nn.Module, layer: str, batches: Sequence[tuple[Tensor, Tensor]], start: float) -> float:
    """Return the largest loss that ascent over a layer's weights meets; they come back as they were."""
    weight = net.get_parameter(f"{layer}.weight").requires_grad_()
    before, worst = weight.detach().clone(), start
    radius = RADIUS * before.norm()
    try:
        for _ in range(ASCENT_EPOCHS):
            for x, y in batches:
                loss = F.cross_entropy(adapted(net)(x), y)
                if not loss.requires_grad:  # a layer that makes no logit
                    return start
                (grad,) = torch.autograd.grad(loss, weight)
                with torch.no_grad():
                    change = weight - before + ASCENT_RATE * grad
                    weight.copy_(before + change * (radius / change.norm().clamp_min(1e-30)).clamp_max(1))
            worst = max(worst, _loss(net, batches))
    finally:
        with torch.no_grad():
            weight.copy_(before)
        weight.requires_grad_(False)
    return worst


@torch.no_grad()
def _loss(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    total = sum(float(F.cross_entropy(adapted(net)(x), y, reduction="sum")) for x, y in batches)
    return total / sum(len(y) for _, y in batches)


def choose_layer(criticality: dict[str, float]) -> str:
    """Return the layer of the least criticality above 0: a layer of none does nothing for the clean images either.

    Raises:
        UserError: there is none.
    """
    alive = {name: value for name, value in criticality.items() if value > 0}
    if not alive:
        raise UserError("finetune needs a convolution or a linear layer on whose weights the loss depends")
    return min(alive, key=alive.__getitem__)


def tuned(net: nn.Module, layer: str, batches: Batches, held_out: Images) -> nn.Module:
    """Return a copy of a network with one layer tuned on clean training images, in eval mode.

    BatchNorm's statistics stay as they are, since everything is in eval mode; in the authors' code all of them drift,
    and the change is more than that of a layer. Of the epochs the one most accurate on the held-out images counts.
    """
    mine = copy.deepcopy(net).eval().requires_grad_(False)
    parameters = [parameter.requires_grad_() for parameter in mine.get_submodule(layer).parameters(recurse=False)]
    optimizer = torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [EPOCHS // 2])
    best, highest = [each.detach().clone() for each in parameters], -1
    with in_fp32(held_out.labels.device):
        for epoch in range(EPOCHS):
            for x, y in batches.epoch(epoch):
                optimizer.zero_grad()
                F.cross_entropy(adapted(mine)(x), y).backward()
                optimizer.step()
            schedule.step()
            if (right := _count_right(mine, held_out)) > highest:
                best, highest = [each.detach().clone() for each in parameters], right
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
    mine.zero_grad()
    return mine.requires_grad_(False)


@torch.no_grad()
def _count_right(net: nn.Module, images: Images) -> int:
    batches = torch.arange(len(images), device=images.labels.device).split(_BATCH_OF_ASCENT)
    return sum(int(classified(adapted(net)(images.floats(rows)), images.labels[rows]).sum()) for rows in batches)
