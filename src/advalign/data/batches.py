"""Shuffled, augmented batches, made on the device where the images lie (B images per batch, N in all)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from advalign.data.augment.geometry import crop_positions, flip_and_crop
from advalign.data.augment.registry import AUGMENTATIONS, Augmentation
from advalign.data.extra import Extra
from advalign.data.images import Images, RowNumbers, to_unit
from advalign.data.stored import StoredImages
from advalign.errors import require, unknown
from advalign.runtime import ranks
from advalign.runtime.files import digest
from advalign.runtime.ranks import Share


class Placement(NamedTuple):
    """Where the images of a batch stand in the set, and where in its padded frame each was cut out."""

    rows: Tensor  # (B,)
    down: Tensor  # (B, H, 1), rows of the frame
    across: Tensor  # (B, 1, W), its columns, backwards where the image is mirrored
    frame: tuple[int, int]
    """Height and width of the padded images."""
    images: int
    """In the set."""

    def cut(self, frames: Float[Tensor, "N C FH FW"]) -> Float[Tensor, "B C H W"]:
        """Return what lies under the batch's images, from something kept for every frame."""
        return frames[self.rows[:, None, None], :, self.down, self.across].permute(0, 3, 1, 2)

    def paste(self, frames: Float[Tensor, "N C FH FW"], pixels: Float[Tensor, "B C H W"]) -> None:
        """Put something of the batch's shape where the images were cut out, in place."""
        frames[self.rows[:, None, None], :, self.down, self.across] = pixels.permute(0, 2, 3, 1)

    def of_all_ranks(self) -> Placement:
        """Return that of the whole batch."""
        return self._replace(**{name: ranks.gather(getattr(self, name)) for name in ("rows", "down", "across")})


class Batches:
    """Epochs of batches over a set of images.

    Batch k of epoch e depends on (seed, e, k) alone: it is the same to the bit on any device, and wherever a run
    resumes. Batches are full: the images left over sit out the epoch, others each time, as the order is drawn anew. A
    set smaller than a batch makes one batch.

    With extra data, a fixed share of each batch comes from them, behind the batch's own images. An epoch is as long as
    without (Wang et al. 2023): it takes fewer of its own images, others each time, and draws the extra ones with
    replacement, since a new order of 50 million would be 400 MB an epoch.

    Args:
        images: batches are made on the device of their labels; stored images are read a batch ahead.
        batch_size: over all processes together.
        augment: a name in `AUGMENTATIONS`.
        seed: of order and augmentation.
        rank: this process; it gets its contiguous share of each batch's own images, and of its extra ones.
        world: the number of processes; where the images cannot be shared out equally, some get one more.
        extra: generated images; they stay where they are, and only what is drawn is read.
        extra_share: their share of each batch, rounded to whole images.
        order: (N,) row numbers, from which each epoch's order is drawn; that of `images` if None.
        further_augment: what makes the further views of the images, a name in `AUGMENTATIONS`; `augment` if None.

    Raises:
        UserError: unknown augmentation, or one that cannot work on such images, no images, or a batch of which a
            process would get none.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        *,
        augment: str,
        seed: int,
        rank: int = 0,
        world: int = 1,
        extra: Extra | None = None,
        extra_share: float = 0.7,
        order: RowNumbers | None = None,
        further_augment: str | None = None,
    ) -> None:
        require(len(images) > 0, "there are no images to make batches of")
        require(batch_size > 0, lambda: f"batch size {batch_size} must be positive")
        self.augmentation = _augmentation(augment, images)
        self.further = _augmentation(further_augment or augment, images)
        self.images, self.seed = images, seed
        self.rank, self.world, self.order = rank, world, order
        self.batch_size = min(batch_size, len(images))
        self.extra, self.generated = extra, 0 if extra is None else round(extra_share * self.batch_size)
        self.real = self.batch_size - self.generated
        require(
            extra is None or min(self.real, self.generated) > 0,
            lambda: (
                f"extra_share={extra_share:g} of a batch of {self.batch_size} is {self.generated} extra and "
                f"{self.real} other images: both must be at least 1"
            ),
        )
        shares = [self._places(each) for each in range(world)]
        require(
            all(shares),
            lambda: (
                f"a batch of {self.batch_size} images leaves none to some of {world} processes: choose a larger batch "
                "size, or fewer processes"
            ),
        )
        self.share = Share(torch.tensor(shares[rank], device="cpu"), self.batch_size)
        """Where this process's images stand in each batch."""

    @property
    def steps(self) -> int:
        """Batches per epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0, *, view: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield an epoch's batches from number `start` on.

        Args:
            view: 1, 2, ...: the same images in the same order, in a further augmentation of its own draws.

        Yields:
            x, (B, C, H, W) float32 in [0, 1], channels last in memory, and y, (B,) int64.
        """
        device = self.images.labels.device
        order, flipped, corners, drawn = self._draw(epoch, view)
        augmentation = self.further if view else self.augmentation
        flipped, corners = flipped.to(device), corners.to(device)
        places = self.share.places.to(device)
        for step, own in enumerate(self._own(order, start), start):
            batch = own
            if self.extra is not None:
                batch = _joined(own, self.extra.take(drawn[self._mine(step, self.generated)]).to(device))
            mine = step * self.batch_size + places
            pixels = self._augmented(batch.pixels, epoch, step, view) if augmentation.then_first else batch.pixels
            pixels = flip_and_crop(pixels, flipped[mine], corners[mine], augmentation.pad)
            pixels = pixels if augmentation.then_first else self._augmented(pixels, epoch, step, view)
            yield Images(pixels, batch.labels).floats(), batch.labels

    def _own(self, order: RowNumbers, start: int) -> Iterator[Images]:
        """Yield the images of the set, in an order (N,) on the CPU, that the batches from number `start` on take."""
        stored = self.images if isinstance(self.images, StoredImages) else None
        order = order if stored else order.to(self.images.labels.device)
        rows = [order[self._mine(step, self.real)] for step in range(start, self.steps)]
        yield from stored.batches(rows) if stored else map(self.images.take, rows)

    def rows(self, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Yield, as `epoch` yields batches, where their images stand in the set, (B,) int64.

        Raises:
            UserError: there are extra data, whose images have no such number.
        """
        require(self.extra is None, "the method keeps a label for each training image, and extra data have none")
        order = self._draw(epoch, view=0)[0].to(self.images.labels.device)
        for step in range(start, self.steps):
            yield order[self._mine(step, self.real)]

    def placements(self, epoch: int, start: int = 0) -> Iterator[Placement]:
        """Yield, as `epoch` yields batches, where their images were cut out.

        Only of augmentations that crop and mirror, and without extra data.
        """
        device, pad = self.images.labels.device, self.augmentation.pad
        order, flipped, corners, _ = (each.to(device) for each in self._draw(epoch, view=0))
        height, width = self.images.shape[2:]
        for step in range(start, self.steps):
            mine = self._mine(step, self.real)
            down, across = crop_positions(flipped[mine], corners[mine], height, width)
            frame = height + 2 * pad, width + 2 * pad
            yield Placement(order[mine], down[:, :, None], across[:, None, :], frame, len(self.images))

    def _places(self, rank: int) -> list[int]:
        """Return where the images of a process stand in each batch: its own ones, then the extra ones."""
        own, generated = _share(self.real, rank, self.world), _share(self.generated, rank, self.world)
        return [*own, *(self.real + place for place in generated)]

    def _mine(self, step: int, size: int) -> slice:
        """Return this process's share of a step in a list that holds `size` for each step."""
        share = _share(size, self.rank, self.world)
        return slice(step * size + share.start, step * size + share.stop)

    def _augmented(self, pixels: Tensor, epoch: int, step: int, view: int) -> Tensor:
        """Do to this process's share of a batch what the augmentation adds to flip and crop, channels last."""
        augmentation = self.further if view else self.augmentation
        if augmentation.then is None:
            return pixels
        draw = _generator(f"{self.seed}, {epoch}, {step}", view)
        size = self.batch_size, augmentation.draws
        uniforms = torch.rand(size, generator=draw, dtype=torch.float64, device="cpu")
        changed = augmentation.then(pixels, uniforms[self.share.places])
        if changed.dtype != pixels.dtype:  # floats that were rounded to 256 levels
            changed = to_unit(changed).to(pixels.dtype)
        return changed.contiguous(memory_format=torch.channels_last)

    def _draw(self, epoch: int, view: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw an epoch's order (N,), flips (N,), upper left corners of the crops (N, 2), and extra rows."""
        draw = _generator(f"{self.seed}, {epoch}", view=0)
        n = len(self.images)
        order = torch.randperm(n, generator=draw, device="cpu")
        order = order if self.order is None else self.order[order]
        drawn = torch.empty(0, dtype=torch.int64, device="cpu")
        if self.extra is not None:
            drawn = torch.randint(len(self.extra), (self.steps * self.generated,), generator=draw, device="cpu")
        augmentation = self.further if view else self.augmentation
        if view:
            draw = _generator(f"{self.seed}, {epoch}", view)
        flipped = torch.rand(n, generator=draw, device="cpu") < (0.5 if augmentation.flip else 0)
        corners = torch.randint(2 * augmentation.pad + 1, (n, 2), generator=draw, device="cpu")
        return order, flipped, corners, drawn


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch, as often as one walks through them."""

    batches: Batches
    epoch: int

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.batches.epoch(self.epoch)


def _share(size: int, rank: int, world: int) -> range:
    """Return which of `size` things a process gets."""
    return range(rank * size // world, (rank + 1) * size // world)


def _augmentation(name: str, images: Images) -> Augmentation:
    """Return the augmentation of a name.

    Raises:
        UserError: there is none, or it cannot work on such images.
    """
    if name not in AUGMENTATIONS:
        raise unknown("augmentation", name, AUGMENTATIONS)
    augmentation = AUGMENTATIONS[name]
    augmentation.check(name, tuple(images.shape[1:]))
    return augmentation


def _generator(of: str, view: int) -> torch.Generator:
    """Return the generator of an epoch, or of one of its batches, in the first augmentation or a further one."""
    # Hashed, so that neighbouring seeds and epochs share nothing: (1, 2), (2, 1) and (0, 3) are three draws.
    # 32 bits are all that torch's CPU generator takes.
    mixed = int(digest(of, digits=8), 16)
    return torch.Generator("cpu").manual_seed(mixed ^ (view * 0x5EC0_0D00 & 0xFFFF_FFFF))


def _joined(first: Images, second: Images) -> Images:
    """Return both one behind the other, as uint8 if both are."""
    labels = torch.cat([first.labels, second.labels])
    if first.pixels.dtype == second.pixels.dtype:
        return Images(torch.cat([first.pixels, second.pixels]), labels)
    return Images(torch.cat([first.floats(), second.floats()]), labels)
