"""Images, their digest, and drawing part of them by class."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from advalign.data import Dataset, Images, hold_out, stratified_subset
from advalign.data.images import require_training
from advalign.errors import UserError


def numbered(labels: list[int]) -> Images:
    """Images that carry their own row number in two pixels."""
    rows = torch.arange(len(labels))
    pixels = torch.stack([rows // 256, rows % 256], 1).to(torch.uint8).reshape(-1, 1, 1, 2)
    return Images(pixels, torch.tensor(labels))


def rows_of(images: Images) -> list[int]:
    high, low = images.pixels.flatten(1).long().unbind(1)
    return (high * 256 + low).tolist()


labels_and_size = st.lists(st.integers(0, 4), min_size=2, max_size=60).flatmap(
    lambda labels: st.tuples(st.just(labels), st.integers(1, len(labels) - 1))
)


@given(labels_and_size, st.integers(0, 2**31))
def test_hold_out_is_disjoint_complete_and_keeps_every_class_share(drawn: tuple[list[int], int], seed: int):
    labels, held_out = drawn
    images = numbered(labels)
    rest, validation = hold_out(images, held_out, seed)
    assert len(validation) == held_out
    assert sorted(rows_of(rest) + rows_of(validation)) == list(range(len(labels)))
    for label in set(labels):
        share = labels.count(label) * held_out / len(labels)
        assert abs(int((validation.labels == label).sum()) - share) < 1
    for part in (rest, validation):
        assert rows_of(part) == sorted(rows_of(part))
        assert part.labels.tolist() == [labels[row] for row in rows_of(part)]


@given(labels_and_size, st.integers(0, 100))
def test_subset_is_the_same_draw(drawn: tuple[list[int], int], seed: int):
    labels, size = drawn
    images = numbered(labels)
    assert rows_of(stratified_subset(images, size, seed)) == rows_of(hold_out(images, size, seed)[1])
    assert rows_of(stratified_subset(images, len(labels), seed)) == list(range(len(labels)))


def test_a_draw_depends_on_its_seed_alone():
    images = numbered([0, 1] * 50)
    first, again, other = (rows_of(hold_out(images, 20, seed)[1]) for seed in (1, 1, 2))
    assert first == again != other


def test_every_image_of_a_class_is_equally_likely_to_be_drawn():
    images = numbered([0] * 5 + [1] * 5)
    drawn = torch.zeros(10)
    for seed in range(500):
        drawn[torch.tensor(rows_of(hold_out(images, 4, seed)[1]))] += 1
    assert drawn.sub(200).abs().max() < 5 * (500 * 0.4 * 0.6) ** 0.5  # five standard deviations


@pytest.mark.parametrize("held_out", [-1, 0, 4, 5])
def test_nothing_held_out_or_left_to_train_on_is_refused(held_out: int):
    with pytest.raises(UserError, match=rf"hold out {held_out} of 4 training images: choose from 1 to 3"):
        hold_out(numbered([0, 1, 0, 1]), held_out, seed=0)


@pytest.mark.parametrize("size", [0, 5])
def test_impossible_subset_is_refused(size: int):
    with pytest.raises(UserError, match=rf"take {size} of 4 images: choose from 1 to 4"):
        stratified_subset(numbered([0, 1, 0, 1]), size, seed=0)


def test_floats_are_pixels_over_255():
    images = Images(torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1), torch.zeros(256, dtype=torch.int64))
    assert torch.equal(images.floats(), torch.tensor([k / 255 for k in range(256)]).reshape(256, 1, 1, 1))
    assert torch.equal(images.floats(slice(3, 5)), images.floats()[3:5])
    assert torch.equal(images.floats(torch.tensor([9, 2])), images.floats()[[9, 2]])
    assert len(images.take([])) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_floats_stay_as_they_are(dtype: torch.dtype):
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(0)).to(dtype)
    images = Images(x, torch.zeros(3, dtype=torch.int64))
    assert images.floats().dtype == dtype
    assert torch.equal(images.floats(), x)
    assert torch.equal(images.take([2, 0]).floats(slice(0, 1)), x[2:])
    finer = Images(x + x.new_tensor(2**-10), images.labels)
    digests = {Dataset("d", part, numbered([0]), ("a",)).digest for part in (images, finer)}
    assert len(digests) == 2


def test_data_without_training_images_serve_evaluation_alone():
    test = numbered([0, 1])
    data = Dataset("mine", test.take([]), test, ("a", "b"))
    assert data.shape == (1, 1, 2)
    assert len(data.digest) == 16
    require_training(replace(data, train=test))
    with pytest.raises(UserError, match=r"^mine has no training images, only 2 test images: it serves evaluation$"):
        require_training(data)


@pytest.mark.parametrize(
    ("pixels", "labels"),
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
    ],
)
def test_what_are_no_images_is_refused(pixels: torch.Tensor, labels: torch.Tensor):
    with pytest.raises(UserError, match="images must be uint8 or floats"):
        Images(pixels, labels)


def test_digest_notices_any_change_and_nothing_else():
    train, test = numbered([0, 1, 2, 0]), numbered([1, 2])
    data = Dataset("one", train, test, ("a", "b", "c"))
    same = Dataset("two", train.take([0, 1, 2, 3]), test, ("x", "y", "z"), note="renamed")
    brighter = Images(train.pixels + 1, train.labels)
    reshaped = Images(train.pixels.reshape(4, 2, 1, 1), train.labels)
    others = [
        replace(data, train=brighter),
        replace(data, train=reshaped),
        replace(data, train=train.take([0, 1, 3, 2])),
        replace(data, test=Images(test.pixels, test.labels.flip(0))),
        replace(data, train=test, test=train),
    ]
    assert data.digest == same.digest
    assert len(data.digest) == 16
    assert len({data.digest, *(other.digest for other in others)}) == 6
    assert data.classes == 3
    assert data.shape == (1, 1, 2)


def test_a_part_of_images_keeps_their_digests(monkeypatch: pytest.MonkeyPatch):
    images = Images(torch.arange(48, dtype=torch.uint8).reshape(4, 3, 2, 2), torch.arange(4))
    expected = images.take([3, 1]).digests
    whole = images.digests
    assert expected.tolist() == whole[[3, 1]].tolist()
    part = images.take(torch.tensor([3, 1]))
    monkeypatch.setattr("advalign.data.images.sha256", None)  # to hash anything again would fail
    assert part.digests.tolist() == part.take([0, 1]).digests.tolist() == expected.tolist()
