"""Trainings that one process and several must carry out alike, on a small network in float64."""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from advalign.runs import Run
from advalign.runs.checkpoint import load_state, load_weights
from advalign.training.recipes import Recipe, digits
from advalign.training.train import train


class Toy(nn.Module):
    """Two stages and a head, in float64."""

    stages = ("layer1", "layer2")

    def __init__(self, classes: int, channels: int) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.fc = nn.Linear(8, classes)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(x)).mean((2, 3)))


def toy(classes: int, channels: int) -> nn.Module:
    return Toy(classes, channels)


def unseeded(classes: int, channels: int) -> nn.Module:
    """A network with weights, and a buffer that no state dict holds, that differ from process to process."""
    net = Toy(classes, channels)
    net.register_buffer("noise", torch.empty(3), persistent=False)
    own = np.random.default_rng(int(os.environ["RANK"]))
    with torch.no_grad():
        for each in (*net.parameters(), net.get_buffer("noise")):
            each.copy_(torch.from_numpy(own.normal(size=each.shape)))
    return net


class OwnNorm(nn.BatchNorm2d):
    """A BatchNorm with a forward pass of its own."""


def own_norm(classes: int, channels: int) -> nn.Module:
    net = Toy(classes, channels)
    net.layer1[1] = OwnNorm(4)
    return net.double()


QUICK = replace(
    digits(), epochs=2, steps=2, batch_size=65, subset=200, validation=40, lr=0.05, warmup=0, augment="flip-crop"
)
"""Three steps an epoch, and batches that two ranks share unequally."""
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "at": ("at", {"average": "ema", "label_smoothing": 0.1, "augment": "autoaugment", "clip_norm": 1.0}),
    "trades": ("trades", {"awp": 0.01, "average": "swa", "average_start": 0.0, "norm": "l2", "eps": 0.5}),
    "ikl": ("ikl", {"average": "ema"}),
    "mtard": ("mtard(balanced=true, rate=0.5)", {}),
    "contrast": ("trades+afa(attack=contrast)", {"batchnorm_passes": "pang"}),
    "whole": ("trades+vfd(weight=0.1, distance=whole-batch)", {"average": "ema"}),
    "ar-at": ("at+ar-at(noisy_clean=true)", {"average": "swa", "average_start": 0.0}),
    "dajat": ("trades+dajat", {"awp": 0.01}),
    "sglr": ("at+sglr(begin=0)", {}),
    "part": ("mart+part(warmup=0)", {"mode": "train"}),
    "adr": ("at+adr", {"average": "method"}),
    "generalist": ("at+generalist(begin=0, every=1)", {"average": "none"}),
    "lbgat": ("trades+lbgat", {"attack": "n-fgsm"}),
    "free": ("at", {"attack": "free(m=2)"}),
    "atta": ("at", {"attack": "atta"}),
    "pgi": ("at+pgi", {"attack": "fgsm-pgi"}),
    "score": ("score(form=at)", {}),
    "consistency": ("at+consistency", {}),
}


def train_case(case: str, folder: Path, **options: Any) -> Run:
    """Train a case, or go on with it."""
    method, changes = CASES[case]
    recipe: Recipe = replace(QUICK, **changes)
    return train(
        method, data="digits", model="tests.training.on_ranks:toy", recipe=recipe, runs=folder, name=case,
        device="cpu", sync_bn=True, trust_model=True, **options,
    )  # fmt: skip


def on_ranks(world: int, work: Callable[[], object]) -> None:
    """Do work in so many processes, forked from this one, that meet as the ranks of a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_forked(rank, world, port, work) for rank in range(world)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world


def _forked(rank: int, world: int, port: int, work: Callable[[], object]) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in the parent, of which the child uses none
        child = os.fork()
    if child:
        return child
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os._exit(code)


def assert_near(a: Path, b: Path, tolerance: float = 1e-12) -> None:
    """Two runs have the same weights, state and log, in whatever number of processes."""
    for checkpoint in ("last", "best"):
        first, second = (load_weights(each / f"{checkpoint}.safetensors")[0] for each in (a, b))
        _assert_near(first, second, tolerance, f"{a.name}, {checkpoint}")
    _assert_near(load_state(a / "state.pt"), load_state(b / "state.pt"), tolerance, f"{a.name}, state")


def _assert_near(a: Any, b: Any, tolerance: float, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        kept = a.keys() - OF_THE_PROCESSES
        assert kept == b.keys() - OF_THE_PROCESSES, where
        for key in kept:
            _assert_near(a[key], b[key], tolerance, f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for number, (left, right) in enumerate(zip(a, b, strict=True)):
            _assert_near(left, right, tolerance, f"{where}[{number}]")
    elif isinstance(a, Tensor):
        assert a.shape == b.shape, where
        assert not a.numel() or float((a.double() - b.double()).abs().max()) <= tolerance, where
    elif isinstance(a, float):
        assert abs(a - b) <= max(tolerance, 1e-6 * abs(a)), where  # of a log, in float32
    else:
        assert a == b, where


OF_THE_PROCESSES = {"seconds", "ranks", "sync_norms"}
