"""Holding out by content: what others do moves nothing, copies stay together, every class has both sides."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
import torch

from advalign.data.held_out import hold_out_by_content, hold_out_validation
from advalign.data.images import Images
from advalign.errors import UserError

DRAW = np.random.default_rng(0)
CONTENTS = DRAW.integers(0, 2**63, 3000, np.uint64)
LABELS = torch.arange(3000) % 3


def held_out(contents: np.ndarray, labels: torch.Tensor) -> set[int]:
    """Return the contents on the test side, after a look that the two sides are all rows."""
    train, test = hold_out_by_content(contents, labels, "mine")
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(contents)))
    assert not set(contents[train].tolist()) & set(contents[test].tolist())
    return set(contents[test].tolist())


def test_a_hash_of_seed_and_content_below_a_fifth_is_held_out():
    expected = {
        content
        for content in CONTENTS.tolist()
        if int(sha256(f"20000, {content}".encode()).hexdigest()[:16], 16) < 2**64 // 5 + 1
    }
    assert held_out(CONTENTS, LABELS) == expected
    assert 0.18 < len(expected) / 3000 < 0.22


def test_adding_removing_and_sorting_others_moves_nothing():
    whole = held_out(CONTENTS, LABELS)
    rows = DRAW.permutation(3000)[:1000]
    assert held_out(CONTENTS[rows], LABELS[rows]) == whole & set(CONTENTS[rows].tolist())


def test_copies_are_on_one_side_in_all_classes():
    twice = np.concatenate([CONTENTS[:60], CONTENTS[:60]])
    assert held_out(twice, torch.cat([LABELS[:60], LABELS[1:61]])) == held_out(CONTENTS[:60], LABELS[:60])


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_class_that_would_have_one_side_only_gives_an_image_to_the_other(side: str):
    train, test = hold_out_by_content(CONTENTS, LABELS, "mine")
    rows = (train if side == "train" else test)[:4]
    others, labels = CONTENTS[1000:1300], LABELS[1000:1300]
    held = held_out(np.concatenate([CONTENTS[rows], others]), torch.cat([torch.full((4,), 3), labels]))
    assert len(held - held_out(others, labels)) == (1 if side == "train" else 3)


def test_a_class_of_two_images_has_one_of_each():
    for first in range(0, 60, 2):
        contents = CONTENTS[first : first + 4]
        assert len(held_out(contents, torch.tensor([0, 0, 1, 1]))) == 2


@pytest.mark.parametrize("contents", [[1], [7, 7, 7]])
def test_a_class_needs_two_different_images(contents: list[int]):
    labels = torch.tensor([0] * 300 + [1] * len(contents))
    with pytest.raises(UserError, match="mine: too few images to hold out a test set: 2 different ones of each class"):
        hold_out_by_content(np.array([*CONTENTS[:300], *contents], np.uint64), labels, "mine")


def ramps(numbers: np.ndarray, labels: np.ndarray) -> Images:
    """Images that hold their number, bit by bit."""
    bits = (numbers[:, None] >> np.arange(16)) & 1
    return Images(torch.from_numpy(bits.astype(np.uint8)).reshape(-1, 1, 4, 4), torch.from_numpy(labels))


def contents(images: Images) -> set[tuple[int, ...]]:
    return {tuple(image.flatten().tolist()) for image in images.pixels}


def test_validation_images_are_the_lowest_fractions_of_each_class_whatever_the_order():
    numbers, labels = np.arange(100), np.arange(100) % 4
    images = ramps(numbers, labels)
    rest, validation = hold_out_validation(images, 20, seed=7)
    for label in range(4):
        rows = np.flatnonzero(labels == label).tolist()
        lowest = sorted(rows, key=lambda row: sha256(f"7, {images.digests[row]}".encode()).digest()[:8])[:5]
        part = validation.take((validation.labels == label).nonzero()[:, 0])
        assert contents(part) == contents(images.take(sorted(lowest)))
    assert contents(rest) | contents(validation) == contents(images)
    shuffled = images.take(torch.from_numpy(DRAW.permutation(100)))
    assert contents(hold_out_validation(shuffled, 20, seed=7)[1]) == contents(validation)
    assert contents(hold_out_validation(images, 20, seed=8)[1]) != contents(validation)


def test_one_image_more_moves_at_most_the_last_of_its_class():
    images = ramps(np.arange(101), np.arange(101) % 4)
    before, after = (contents(hold_out_validation(images.take(list(range(n))), 20, 7)[1]) for n in (100, 101))
    assert len(before - after) <= 1


def test_copies_are_validated_or_trained_on_together_also_across_classes():
    numbers = np.concatenate([np.arange(60), np.arange(60)])
    rest, validation = hold_out_validation(ramps(numbers, np.arange(120) % 3), 12, 0)
    assert not contents(rest) & contents(validation)
    assert 12 <= len(validation) <= 24


def test_every_class_keeps_an_image_to_train_on():
    labels = np.array([0] * 20 + [1] * 2 + [2] + [3] * 3)
    numbers = np.concatenate([np.arange(23), [90, 90, 90]])
    for seed in range(5):
        rest, _ = hold_out_validation(ramps(numbers, labels), 20, seed)
        assert rest.labels.unique().tolist() == [0, 1, 2, 3]
    with pytest.raises(UserError, match="cannot hold out 1 of 3 training images: too few of them are different"):
        hold_out_validation(ramps(numbers[-3:], labels[:3]), 1, 0)
