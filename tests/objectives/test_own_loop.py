"""A training loop of one's own: what it forgets, or gives wrongly, is named and not trained by another method."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.networks import tiny
from torch.utils.data import DataLoader, TensorDataset

from advalign.errors import UserError
from advalign.objectives import Objective, compose, parse
from advalign.threats import Linf

IMAGES, BATCH = 10, 4


@pytest.fixture
def loader() -> DataLoader:
    draw = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.rand(IMAGES, 3, 8, 8, generator=draw), torch.arange(IMAGES) % 4), BATCH)


def bound(method: str) -> Objective:
    return compose(parse(method), student=tiny(0), robust=tiny(1), vanilla=tiny(2)).train()


def attack_all(objective: Objective, loader: DataLoader, times: int = 1) -> None:
    for x, y in loader:
        for _ in range(times):
            objective.perturb(x, y, Linf(), steps=1)


@pytest.mark.parametrize("method", ["iad", "at+ar-at", "at+part", "mtard"])
def test_an_epoch_that_nobody_started_is_noticed_at_its_beginning(method: str, loader: DataLoader):
    objective = bound(method)
    objective.start_epoch(loader, 0.0)
    attack_all(objective, loader)
    with pytest.raises(UserError, match=r"follows the epochs, .*than the 12 of its loader: call it before each epoch"):
        attack_all(objective, loader)


def test_who_starts_each_epoch_attacks_as_often_as_wanted(loader: DataLoader):
    objective = bound("iad")
    for epoch in range(3):
        objective.start_epoch(loader, epoch / 3)
        attack_all(objective, loader, times=3)  # the same images, which count once
        attack_all(objective.eval(), loader, times=2)  # to measure, and not to train
        copy.deepcopy(objective.train())


def test_methods_that_follow_no_epochs_and_lists_are_not_counted(loader: DataLoader):
    steady = bound("trades")
    steady.start_epoch(loader, 0.0)
    first = bound("iad")
    first.start_epoch(list(loader)[:1], 0.0)  # a part of an epoch is enough for some methods
    for _ in range(3):
        attack_all(steady, loader)
        attack_all(first, loader)


@pytest.mark.parametrize("row", [20, -1, 10**9])
def test_a_number_of_no_training_image_is_refused(row: int):
    objective = compose(parse("at+sglr(begin=0)"), student=tiny(0), images=20).train()
    x, y = torch.rand(4, 3, 8, 8), torch.arange(4)
    objective.start_epoch([(x, y)], 0.0)
    with pytest.raises(UserError, match=rf"rows= holds {row}, .*has 20 images, so they are numbers from 0 to 19"):
        objective(x, x, y, None, torch.tensor([0, 19, row, 3]))
    objective(x, x, y, None, torch.tensor([0, 19, 7, 3]))
