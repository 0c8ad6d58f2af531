"""Data that the tests share: a batch of random images, records of made-up results, and a study in YAML."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from advalign.runs import Record

RECORD = Record(
    method="trades",
    data="digits",
    images="0123",
    model="small-cnn",
    checkpoint="best",
    attack="clean",
    threat="Linf(0.2)",
    accuracy=0.95,
    n=500,
    precision="fp32",
    attack_seed=0,
    batch_size=512,
    training_images=1147,
    epochs=15,
    recipe="r",
    seed=0,
    run="abc",
    seconds=1.0,
    commit="",
    torch="2.13.0",
    device="cpu",
)

STUDY_YAML = """
title: the weight
data: digits
model: small-cnn(width=4)
recipe: {preset: digits, epochs: 2, eps: 8/255, milestones: [0.5, 0.9]}
seeds: 2
methods:
  - natural
  - {method: trades, curve: trades+vfd, at: 0}
  - {method: trades+vfd(weight=0.10), row: a tenth, curve: trades+vfd, at: 0.1, recipe: {epochs: 3}}
columns:
  - clean
  - {heading: PGD, attack: pgd(steps=2), n: 100}
  - {heading: far, attack: fgsm, black_box: true}
surrogate: {method: natural, model: small-cnn(width=8)}
figure: weight
"""
"""A study of one's own, with every key."""


def records() -> list[Record]:
    """Clean and worst-case accuracies of three methods, one of them with two seeds."""
    accuracies = {
        ("trades", 0): (0.90, 0.50), ("trades", 1): (0.92, 0.54), ("trades(beta=1)", 0): (0.95, 0.40),
        ("trades+vfd", 0): (0.94, 0.49),
    }  # fmt: skip
    return [
        replace(RECORD, method=method, seed=seed, run=f"{method}{seed}", attack=attack, accuracy=accuracy)
        for (method, seed), pair in accuracies.items()
        for attack, accuracy in zip(("clean", "worst(fgsm, mim(steps=20))"), pair, strict=True)
    ]


def batch(n: int = 8, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Draw images (n, 3, 8, 8) in [0, 1] and labels (n,), the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(0, classes, (n,), generator=generator)
