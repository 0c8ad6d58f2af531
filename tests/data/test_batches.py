"""Batches: which images, in which order, cropped and mirrored how."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from advalign.data import AUGMENTATIONS, Batches, Extra, Images
from advalign.errors import UserError


def random_images(n: int, channels: int = 3, height: int = 12, width: int = 11) -> Images:
    """Distinct images; labels are row numbers."""
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (n, channels, height, width), generator=draw, dtype=torch.uint8)
    return Images(pixels, torch.arange(n))


def make(images: Images, batch_size: int = 8, augment: str = "flip-crop", seed: int = 3, **share: Any) -> Batches:
    return Batches(images, batch_size, augment=augment, seed=seed, **share)


def whole(batches: Batches, epoch: int, start: int = 0) -> tuple[Tensor, Tensor]:
    parts = list(batches.epoch(epoch, start))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def views(image: Tensor, flip: bool, crop: bool) -> dict[tuple[int, int, int], Tensor]:
    """Every view augmentation may make of a (C, H, W) image in [0, 1], by brute force."""
    _, height, width = image.shape
    pad = 4 if crop else 0
    framed = F.pad(image, (pad, pad, pad, pad))
    return {
        (mirrored, top, left): cut.flip(2) if mirrored else cut
        for mirrored in range(2 if flip else 1)
        for top in range(2 * pad + 1)
        for left in range(2 * pad + 1)
        for cut in [framed[:, top : top + height, left : left + width]]
    }


@pytest.mark.parametrize(("augment", "flip", "crop"), [("none", 0, 0), ("flip", 1, 0), ("flip-crop", 1, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_image_is_one_of_its_own_views(augment: str, flip: int, crop: int, channels: int):
    images = random_images(40, channels)
    for x, y in make(images, augment=augment).epoch(0):
        for image, label in zip(x, y, strict=True):
            original = images.floats(label[None])[0]
            assert any(torch.equal(image, view) for view in views(original, bool(flip), bool(crop)).values())


def test_flips_and_offsets_are_drawn_evenly_and_for_each_image_alone():
    images = random_images(1, height=6, width=5).take([0] * 4000)
    possible = views(images.floats()[0], flip=True, crop=True)
    table = {view.numpy().tobytes(): key for key, view in possible.items()}
    assert len(table) == 2 * 9 * 9  # every view is told from every other
    x, _ = whole(make(images, batch_size=1000), epoch=0)
    seen = torch.zeros(2, 9, 9)
    for image in x:
        seen[table[image.contiguous().numpy().tobytes()]] += 1
    for margin, p in ((seen.sum((1, 2)), 1 / 2), (seen.sum((0, 2)), 1 / 9), (seen.sum((0, 1)), 1 / 9)):
        assert (margin - 4000 * p).abs().max() < 5 * (4000 * p * (1 - p)) ** 0.5
    assert (seen > 0).all()


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_every_image_at_most_once_and_full_batches_only(augment: str):
    batches = make(random_images(43), augment=augment)
    assert batches.steps == 5
    _, y = whole(batches, epoch=0)
    assert len(y) == 40
    assert len(y.unique()) == 40
    left_out = [set(range(43)) - set(whole(batches, epoch)[1].tolist()) for epoch in range(3)]
    assert left_out[0] != left_out[1]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_resuming_at_a_batch_gives_the_tail_to_the_bit(augment: str):
    images = random_images(43)
    x, y = whole(make(images, augment=augment), epoch=2)
    for start in range(5):
        x_tail, y_tail = whole(make(images, augment=augment), epoch=2, start=start)
        assert torch.equal(x_tail, x[8 * start :])
        assert torch.equal(y_tail, y[8 * start :])
    assert not list(make(images).epoch(2, start=5))


def test_the_global_generator_is_neither_read_nor_moved():
    images = random_images(24)
    torch.manual_seed(1)
    x, _ = whole(make(images), epoch=0)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(x, whole(make(images), epoch=0)[0])


def test_seeds_and_epochs_do_not_mix():
    images = random_images(64)
    orders = {tuple(whole(make(images, seed=s), epoch=e)[1].tolist()) for s in range(4) for e in range(4)}
    assert len(orders) == 16


def test_augmentation_does_not_change_the_order():
    images = random_images(24)
    orders = {tuple(whole(make(images, augment=augment), epoch=1)[1].tolist()) for augment in AUGMENTATIONS}
    assert len(orders) == 1


@pytest.mark.parametrize(("world", "extra_share"), [(2, 0.3), (3, 0.3), (3, None), (8, None)])
@pytest.mark.parametrize("augment", ["flip-crop", "autoaugment"])
def test_ranks_share_each_batch_also_unequally(world: int, extra_share: float | None, augment: str):
    images = random_images(43)
    options: dict[str, Any] = {"augment": augment}
    if extra_share:
        others = random_images(30)
        options |= {"extra": Extra(others.pixels.numpy(), others.labels.numpy()), "extra_share": extra_share}
    ranks = [make(images, rank=rank, world=world, **options) for rank in range(world)]
    places = torch.cat([each.share.places for each in ranks])
    assert sorted(places.tolist()) == list(range(8))
    shares = [list(each.epoch(1)) for each in ranks]
    for step, (x, y) in enumerate(make(images, **options).epoch(1)):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), x[places])
        assert torch.equal(torch.cat([share[step][1] for share in shares]), y[places])


def test_a_small_set_is_one_batch():
    batches = make(random_images(5), batch_size=128)
    assert batches.steps == 1
    ((x, y),) = batches.epoch(0)
    assert x.shape == (5, 3, 12, 11)
    assert sorted(y.tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_format(augment: str):
    x, y = next(make(random_images(16), augment=augment).epoch(0))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert 0 <= x.min() <= x.max() <= 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"augment": "flip-corp"}, "unknown augmentation 'flip-corp': did you mean 'flip-crop'"),
        ({"batch_size": 0}, "batch size 0 must be positive"),
        ({"batch_size": 3, "world": 4}, "a batch of 3 images leaves none to some of 4 processes: choose a larger"),
        ({"images": random_images(0)}, "there are no images"),
    ],
)
def test_errors(wrong: dict, message: str):
    with pytest.raises(UserError, match=message):
        make(**{"images": random_images(16), **wrong})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_any_device_gives_the_same_bits(augment: str):
    images = random_images(43)
    x, y = whole(make(images, augment=augment), epoch=2)
    x_there, y_there = whole(make(images.to("cuda"), augment=augment), epoch=2)
    assert x_there.is_cuda
    assert torch.equal(x_there.cpu(), x)
    assert torch.equal(y_there.cpu(), y)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_float_images_are_augmented_as_uint8_are(augment: str):
    images = Images(random_images(20).floats(), random_images(20).labels)
    batches = (Batches(each, 8, augment=augment, seed=3).epoch(1) for each in (random_images(20), images))
    for (x, y), (same_x, same_y) in zip(*batches, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)
        assert x.stride() == same_x.stride()


def test_float_images_are_not_rounded():
    x = torch.rand(4, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    ((batch, labels),) = Batches(Images(x, torch.arange(4)), 4, augment="none", seed=0).epoch(0)
    assert torch.equal(batch, x[labels])
