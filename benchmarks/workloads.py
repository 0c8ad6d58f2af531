"""What is timed: one step of training, or one evaluation, each in several ways from equal weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advalign import attacks, models
from advalign.data import Batches, Dataset, Images, load, stratified_subset
from advalign.evaluation.accuracy import Evaluation, evaluate
from advalign.models.winograd import FEWEST
from advalign.objectives import Objective, compose, parse
from advalign.runtime.device import to_device
from advalign.runtime.seeds import derive_seed, seeded
from advalign.threats import Linf
from advalign.training.recipes import Recipe
from advalign.training.step import Step
from benchmarks import plain
from benchmarks.timing import Way

RECIPE = Recipe(lr=0.1, schedule="constant", steps=plain.STEPS)  # eps 8/255 in steps of 2/255: the plain loops' setting
TRAINING = {
    "natural": "natural",
    "at": "at",
    "trades": "trades(beta=6)",
    "trades+vfd": "trades(beta=6)+vfd(weight=0.02)",
    "trades+lbgat": "trades(beta=6)+lbgat",
}
GUEST = {"trades+vfd": "vanilla", "trades+lbgat": "guide"}


def networks(workload: str, width: int, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, nn.Module | None]:
    """Return the student, and the other network of the workload's method: the same in every way of doing it."""
    with seeded("benchmark", width):
        student, guest = (models.build(f"resnet18(width={width})", classes=10) for _ in range(2))
    student, guest = student.to(device, dtype).train(), guest.to(device, dtype)
    if GUEST.get(workload) == "vanilla":
        guest.requires_grad_(False).eval()
    return student, guest if workload in GUEST else None


def training_step(
    workload: str,
    way: str,
    width: int,
    size: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Way, nn.Module]:
    """Return one training step on a fixed batch in one way, and the student that it trains.

    Ways: `authors`, `once` and `once, best`, the plain loops; `ours`; `ours, bf16`; on a GPU `ours, bf16, graphs`.
    """
    where = torch.device(device)
    student, guest = networks(workload, width, dtype, where)
    with seeded("images"):
        x, y = torch.rand(size, 3, 32, 32).to(where, dtype), (torch.arange(size) % 10).to(where)
    if way.startswith("ours"):
        return _ours(workload, way, student, guest, x, y), student
    authors, best = way == "authors", way == "once, best"
    if best:
        for network in (student,) if guest is None else (student, guest):
            to_device(network, where)
        x = x.contiguous(memory_format=torch.channels_last)
    if workload == "natural":
        step = plain.natural(student)
    elif workload == "at":
        step = plain.at(student, authors=authors)
    elif workload == "trades+lbgat" and guest is not None:
        step = plain.lbgat(student, guest.train(), authors=authors)
    else:
        step = plain.trades(student, guest, authors=authors)
    return (partial(_in_bf16, step, x, y) if best else partial(step, x, y)), student


def _in_bf16(step: plain.Step, x: Tensor, y: Tensor) -> None:
    with torch.autocast(x.device.type, torch.bfloat16):
        step(x, y)


def natural_epoch(way: str, width: int, size: int, images: int, device: str = "cpu") -> Way:
    """Return an epoch of natural training, from uint8 images to updates, in one way.

    Ways: `plain` with a loader of no workers, `plain, workers` with several, and ours as `training_step` has them.
    """
    where = torch.device(device)
    student, _ = networks("natural", width, torch.float32, where)
    with seeded("images"):
        pixels, labels = torch.randint(256, (images, 3, 32, 32), dtype=torch.uint8), torch.arange(images) % 10
    if way.startswith("plain"):
        workers = min(8, os.cpu_count() or 1) if "workers" in way else 0
        return plain.epoch(student, pixels, labels, size, workers)
    batches = Batches(Images(pixels, labels).to(where), size, augment="flip-crop", seed=0)
    objective = to_device(Objective(parse("natural"), student, {}), where).train()
    step = Step(objective, _recipe(way), batches.steps, where, cuda_graphs="graphs" in way)

    def run() -> None:
        step.start_epoch(0)
        for x, y in batches.epoch(0):
            step.schedule(0)
            step.update(x, x, y, None)

    return run


def _recipe(way: str) -> Recipe:
    return replace(RECIPE, precision="bf16" if "bf16" in way else "fp32")


def _ours(workload: str, way: str, student: nn.Module, guest: nn.Module | None, x: Tensor, y: Tensor) -> Way:
    method = parse(TRAINING[workload])
    objective = Objective(method, student, {} if guest is None else {GUEST[workload]: guest})
    objective = to_device(objective, x.device).train()
    step = Step(objective, _recipe(way), 1, x.device, cuda_graphs="graphs" in way)
    if x.dtype == torch.float32:  # as the library's batches are; random starts are drawn in the order of memory
        x = x.contiguous(memory_format=torch.channels_last)

    def once() -> None:
        step.schedule(0)
        step.update(x, step.perturb(x, y, None), y, None)

    return once


def memory_of(workload: str, way: str, width: int, size: int, device: str) -> Way:
    """Return the step alone, for a process that measures its memory."""
    return training_step(workload, way, width, size, device)[0]


def differences(workload: str, ways: tuple[str, ...], width: int, device: str, steps: int = 1) -> dict[str, float]:
    """Return each way's relative difference from the first's, in what so many steps in float64 make of the weights.

    Rounding is all they may differ by, in the first step; then TRADES' authors' loop has other running statistics.
    """
    updates = {}
    for way in ways:
        step, student = training_step(workload, way, width, FEWEST, device, torch.float64)
        before = _flat(student)
        for seed in range(steps):
            torch.manual_seed(seed)
            step()
        updates[way] = _flat(student) - before
    first = updates[ways[0]]
    return {way: float((update - first).norm() / first.norm()) for way, update in updates.items()}


def _flat(net: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def half_robust(data: Dataset, cache: Path, epochs: int = 8, count: int = 10_000) -> nn.Module:
    """Return a small network trained against 8/255: of what it gets right, about half withstands PGD."""
    net = models.build("small-cnn(width=16)", classes=data.classes, channels=data.shape[0])
    file = cache / f"half-robust-{data.digest[:8]}-{epochs}-{count}.pt"
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
        return net.eval()
    recipe = Recipe(epochs=epochs, schedule="onecycle", lr=0.2, nesterov=True, steps=5)
    with seeded("half-robust"):
        objective = to_device(compose(parse("at"), student=net), torch.device("cpu")).train()
        chosen = stratified_subset(data.train, min(count, len(data.train)), 0)
        batches = Batches(chosen, recipe.batch_size, augment="flip-crop", seed=0)
        step = Step(objective, recipe, batches.steps, torch.device("cpu"))
        for epoch in range(epochs):
            for k, (x, y) in enumerate(batches.epoch(epoch)):
                torch.manual_seed(derive_seed(epoch, k))
                step.schedule(epoch * batches.steps + k)
                step.update(x, step.perturb(x, y, None), y, None)
    cache.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), file)
    return net.eval()


def evaluations(
    data_name: str, data_dir: Path | None, cache: Path, n: int, device: torch.device
) -> dict[str, tuple[dict[str, Callable[[], Any]], int]]:
    """Return the evaluations by name, each in three ways that tell which images withstand, and its images."""
    data = load(data_name, directory=data_dir)
    net = half_robust(data, cache).to(device)
    images = stratified_subset(data.test, n, 0).to(device)
    few = stratified_subset(data.test, n // 4, 0).to(device)
    fast = to_device(copy.deepcopy(net), device)
    threat = Linf(plain.EPS)

    def ours(spelling: str, images: Images, precision: str = "fp32") -> Tensor:
        attack = attacks.parse(spelling, threat=threat)
        found: Evaluation = evaluate(fast, images, [attack], batch_size=256, precision=precision)
        return list(found.correct.values())[1]

    def theirs(attack: Callable[[nn.Module, Tensor, Tensor], Tensor], images: Images) -> Tensor:
        flags = []
        for rows in torch.arange(len(images), device=device).split(256):
            x, y = images.floats(rows).contiguous(), images.labels[rows]
            with torch.no_grad():
                right = net(x).argmax(1) == y
            flags.append(attack(net, x, y) & right)
        return torch.cat(flags).cpu()

    def ways(plainly: Callable[..., Tensor], spelling: str, images: Images) -> tuple[dict[str, Callable[[], Any]], int]:
        return {
            "plain": partial(theirs, plainly, images),
            "ours": partial(ours, spelling, images),
            "ours, bf16": partial(ours, spelling, images, "bf16"),
        }, len(images)

    return {
        "PGD-20": ways(plain.pgd, "pgd(steps=20)", images),
        "C&W-100": ways(plain.carlini_wagner, "cw(steps=100)", few),
    }
