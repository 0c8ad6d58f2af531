"""A training step on the device `meta`, which holds no values: a value read fails, and so does a tensor left elsewhere.

The step is that of the training with all its aids, and it does nothing that the capture of a CUDA graph would refuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
import torch
from tests.networks import tiny
from tests.objectives.short_training import GUESTS, combinations, every_part_quick, mirrored
from tests.recording import OnMeta

from advalign.data import Batches, Images
from advalign.errors import UserError
from advalign.objectives import Objective, parse, total
from advalign.objectives.terms import check_smoothing
from advalign.threats import L2, Linf
from advalign.training.attacks import CHEAP
from advalign.training.averaging import Average
from advalign.training.graphs import NOT_CAPTURED
from advalign.training.recipes import Recipe
from advalign.training.step import Step
from advalign.training.weight_perturbation import adversarial_weights

SINGLE = combinations(0) + combinations(1)
ALL = [  # parts do not move each other's tensors
    *every_part_quick(SINGLE),
    "mtard(balanced=true)",
    "score(form=at)",
]
FEW = ("trades+vfd", "mart", "mtard", "ikl", "at+ar-at", "contrast", "trades+dajat", "trades+lbgat")
STEPPED = [  # the others are slow, but for those that are weekly anyway
    each if each in FEW or not isinstance(each, str) else pytest.param(each, marks=pytest.mark.slow) for each in ALL
]
META = torch.device("meta")
AIDED = Recipe(
    epochs=4, steps=1, schedule="onecycle", nesterov=True, clip_norm=1.0, awp=0.01, average="ema",
    batchnorm_passes="clean", batchnorm_momentum=0.1, eps_ramp=True,
)  # fmt: skip


def on_meta(method: str, dtype: torch.dtype = torch.float32, smoothing: float = 0.0):
    """Bind a method to networks that are on the device already, as `compose(..., student=net.cuda())` does."""
    guests = {name: tiny(k).to("meta", dtype) for k, name in enumerate(GUESTS, start=7)}
    objective = Objective(parse(method), tiny(0).to("meta", dtype), guests, smoothing, images=64).train()
    x = torch.empty(8, 3, 8, 8, device="meta", dtype=dtype)
    y = torch.empty(8, device="meta", dtype=torch.long)
    objective.start_epoch([(x, y)], progress=0.5)
    return objective, x, y


def smoothed(method: str) -> float:
    """A label smoothing, where the method takes any."""
    try:
        check_smoothing(parse(method), 0.1)
    except UserError:
        return 0.0
    return 0.1


@pytest.mark.parametrize("method", STEPPED)
def test_a_step_with_every_aid_stays_on_the_device_and_can_be_captured(method: str):
    objective, x, y = on_meta(method, smoothing=smoothed(method))
    step = Step(objective, AIDED, 4, META)
    step.start_epoch(1)
    step.schedule(5)
    second = mirrored(objective, x) if objective.method.second else None
    with OnMeta() as capture:
        loss, terms = step.update(x, step.perturb(x, y, second), y, second, y)
    assert capture.refused == []
    assert loss.is_meta
    assert all(term.value.is_meta for term in terms.values())
    learns = [p for p in objective.parameters() if p.requires_grad]
    assert all(step.optimizer.state[p]["momentum_buffer"].is_meta for p in learns)  # each had a gradient
    average = Average(objective, AIDED, 4)
    average.update(1)
    assert all(weight.is_meta for weight in average.weights)


@pytest.mark.weekly
@pytest.mark.slow
def test_every_base_with_every_plug_in_does():
    for method in SINGLE:
        test_a_step_with_every_aid_stays_on_the_device_and_can_be_captured(method)


def batches(augment: str) -> Iterator[tuple[Any, ...]]:
    """Batches of images on the device, with where they were cut out, as far as the augmentation tells."""
    images = Images(
        torch.empty(16, 3, 12, 12, dtype=torch.uint8, device="meta"), torch.empty(16, dtype=torch.long, device="meta")
    )
    made = Batches(images, 8, augment=augment, seed=0)
    placed = made.placements(0) if augment in ("none", "flip", "flip-crop") else iter([None, None])
    return zip(made.epoch(0), placed, strict=True)


@pytest.mark.parametrize("attack", ["pgd", *CHEAP])
def test_the_training_attacks_stay_on_the_device(attack: str):
    objective, _, _ = on_meta("at")
    step = Step(objective, replace(AIDED, attack=attack, awp=0.0, batchnorm_passes="loss"), 4, META)
    step.attack.start_epoch(1, 4)
    for at, ((x, y), placement) in enumerate(batches("flip-crop")):
        step.schedule(at)
        with OnMeta() as capture:
            step.update(x, step.perturb(x, y, None, placement), y, None)
        assert not capture.refused or attack in NOT_CAPTURED
    assert all(kept.is_meta for kept in step.attack.state().values())


@pytest.mark.parametrize("augment", get_args(get_type_hints(Recipe)["augment"]))
def test_the_augmentations_stay_on_the_device(augment: str):
    assert all(x.is_meta and y.is_meta for (x, y), _ in batches(augment))


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_stay_on_the_device(average: str):
    kept = Average(on_meta("trades+ar-at")[0], replace(AIDED, average=average), 4)
    for done in range(20):
        kept.update(done)
    assert kept.count
    assert all(weight.is_meta for weight in kept.weights)


@pytest.mark.parametrize("method", ["trades", "at+ar-at", "mtard"])
def test_an_l2_attack_in_train_mode_and_perturbed_weights_stay_there_too(method: str):
    objective, x, y = on_meta(method)
    x_adv = objective.perturb(x, y, L2(0.5), steps=2, mode="train")
    with adversarial_weights(objective, 0.01, lambda: objective(x, x_adv, y)):
        assert total(objective(x, x_adv, y)).is_meta


@pytest.mark.parametrize("method", ["at+ar-at", "mtard", "ikl", "at+part"])
def test_the_parts_compute_in_the_numeric_type_of_the_student(method: str):
    objective, x, y = on_meta(method, torch.float64)
    x_adv = objective.perturb(x, y, Linf(), second=mirrored(objective, x), steps=1)
    assert total(objective(x, x_adv, y, mirrored(objective, x))).dtype == torch.float64
