"""What a data set is: images with labels, a name, a digest; and the one way of drawing part of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

from advalign.data.cache import remembered
from advalign.errors import require
from advalign.runtime.files import digest, digest_of_stream
from advalign.shapes import ImageBatch, Labels

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer as Buffer

RowNumbers = Int[Tensor, "_"]  # row numbers

Digests = NDArray[np.uint64]
"""(N,), one for each image."""

SPLIT_SEED = 20_000
"""Seed of every split that belongs to the data set: the same test images in every run, whatever the run's seed."""


LARGE = 1 << 30
"""Bytes of pixels above which they are not read whole where a sum that was made before tells the same."""

_PART = 16 << 20  # bytes of images that are looked at together


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels, together on one device.

    Raises:
        UserError: wrong types, or not one label per image.
    """

    pixels: Tensor
    """(N, C, H, W), uint8, or floats that need not be multiples of 1/255; what attacks them checks their range."""
    labels: Tensor
    """(N,), int64, from 0."""

    def __post_init__(self) -> None:
        readable = self.pixels.dtype == torch.uint8 or self.pixels.is_floating_point()
        fits = readable and self.pixels.ndim == 4 and self.labels.dtype == torch.int64
        require(
            fits and self.labels.shape == self.pixels.shape[:1],
            lambda: (
                f"images must be uint8 or floats (N, C, H, W) with int64 labels (N,), not {self.pixels.dtype} "
                f"{tuple(self.pixels.shape)} with {self.labels.dtype} {tuple(self.labels.shape)}"
            ),
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return self.pixels.shape

    @property
    def dtype(self) -> torch.dtype:
        """The type of the pixels."""
        return self.pixels.dtype

    @property
    def size(self) -> int:
        """Bytes of all pixels."""
        return self.shape.numel() * self.dtype.itemsize

    def parts(self) -> Iterator[slice]:
        """Yield the row numbers of all images, part by part, of which none takes much memory."""
        each = max(1, _PART // max(1, self.size // max(1, len(self))))
        yield from (slice(first, min(first + each, len(self))) for first in range(0, len(self), each))

    def take(self, rows: RowNumbers | list[int]) -> Images:
        """Return a copy of the images with these row numbers, in this order."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device=self.labels.device)
        taken = Images(self.pixels[rows], self.labels[rows])
        if "digests" in vars(self):  # which take seconds for each gigabyte
            vars(taken)["digests"] = self.digests[rows.cpu().numpy()]
        return taken

    def to(self, device: torch.device | str) -> Images:
        """Return the images on a device; nothing is copied if they are there."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def split(self, lengths: Sequence[int]) -> list[Images]:
        """Return so many images after one another each; nothing is copied."""
        parts = zip(self.pixels.split(list(lengths)), self.labels.split(list(lengths)), strict=True)
        return [Images(pixels, labels) for pixels, labels in parts]

    def relabelled(self, labels: Labels) -> Images:
        """Return the same images with other labels (N,)."""
        return Images(self.pixels, labels)

    def read(self, rows: slice | Tensor | None = None) -> Tensor:
        """Return the pixels of the images, or of some, as they are stored (N, C, H, W)."""
        return self.pixels if rows is None else self.pixels[rows]

    def floats(self, rows: slice | Tensor | None = None) -> ImageBatch:
        """Return the images, or some, as floats (N, C, H, W): uint8 as float32 in [0, 1], floats as they are."""
        pixels = self.read(rows)
        return pixels if pixels.is_floating_point() else to_unit(pixels)

    def content(self) -> Iterator[Buffer]:
        """Yield the bytes of all pixels, part by part."""
        yield self.pixels.cpu().contiguous().numpy().data

    @cached_property
    def digests(self) -> Digests:
        """The first 8 bytes of the SHA-256 of each image's shape and pixels; equal images have equal ones.

        Labels do not count, and floats that are multiples of 1/255 have the digests of the uint8 images they stand for.
        """
        return digests_of(self.pixels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images of one kind."""

    name: str
    train: Images
    """None at all, (0, C, H, W), where the data serve evaluation alone."""
    test: Images
    class_names: tuple[str, ...]
    note: str = ""
    """What a reader of results must know, such as a test set that is no official one."""
    named: bool = True
    """Whether the class names are names; else they are the numbers of the classes, which fit any other names."""
    preprocessing: Mapping[str, str] = field(default_factory=dict)
    """What was done to the images before they were stored: the name of each step to how it was done."""
    validation: Images | None = None
    """Images on which checkpoints are selected, where the user has set some apart."""
    held_out: bool = False
    """Whether the test images are training images that were held out, since there was no test set."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Where the images of each split were read from, for data of the user's own."""
    places: Mapping[str, Sequence[str | Path]] = field(default_factory=dict)
    """Where each image of a split was read from, for data of the user's own: a file, or a row of an array."""
    remarks: tuple[str, ...] = ()
    """What else was understood of the user's files, such as those that were skipped; a line each."""

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 over all pixels and labels; other data under the same name is noticed by it.

        Of large data it is remembered in the cache, under what each image's own digest and label say.
        """
        splits = (self.train, self.test, *([] if self.validation is None else [self.validation]))
        labels = [images.labels.cpu().contiguous().numpy() for images in splits]

        def whole() -> str:
            parts = zip(splits, labels, strict=True)
            return digest_of_stream(
                chain.from_iterable(chain([repr(tuple(each.shape))], each.content(), [of.data]) for each, of in parts)
            )

        if sum(images.size for images in splits) <= LARGE:
            return whole()
        each = (part for images, of in zip(splits, labels, strict=True) for part in (images.digests, of))
        return remembered(f"data-{digest(repr(self.shape), *(part.tobytes() for part in each))}", whole)

    @cached_property
    def training_digest(self) -> str:
        """16 hex digits of the SHA-256 over the training and validation images with their labels, in whatever order.

        Test images do not count, so that adding some of them trains nothing anew.
        """
        parts = [repr(self.shape)]
        for images in (self.train, *([] if self.validation is None else [self.validation])):
            order = content_order(images).numpy()
            digests, labels = images.digests[order], images.labels.cpu().numpy()[order]
            parts += [repr(len(order)), digests.astype("<u8").tobytes(), labels.astype("<i8").tobytes()]
        return digest(*parts)


def digests_of(pixels: Tensor) -> Digests:
    """Return `Images.digests` of pixels (N, C, H, W)."""
    shape, pixels = tuple(pixels.shape[1:]), pixels.cpu()
    rows = map(_as_bytes, pixels) if pixels.is_floating_point() else map(bytes, pixels.contiguous().numpy())
    return np.fromiter((digest_of_image(shape, row) for row in rows), np.uint64, len(pixels))


def digest_of_image(shape: tuple[int, ...], content: bytes) -> int:
    """Return the first 8 bytes of the SHA-256 of an image's shape (C, H, W) and pixels."""
    total = sha256(repr(shape).encode())
    total.update(content)
    return int.from_bytes(total.digest()[:8])


def content_order(images: Images) -> RowNumbers:
    """Return the row numbers (N,) in the order of the images' digests and labels, which no name or place changes."""
    return torch.from_numpy(np.lexsort((images.labels.cpu().numpy(), images.digests)))


def _as_bytes(pixels: Float[Tensor, "C H W"]) -> bytes:
    """Return an image's pixels, as uint8 where they are multiples of 1/255 up to rounding, else as float32."""
    levels = (pixels.double() * 255).round()
    whole = (levels / 255 - pixels).abs().max() < 1e-6 and levels.min() >= 0 and levels.max() <= 255
    return (levels.to(torch.uint8) if whole else pixels.float()).contiguous().numpy().tobytes()


def require_training(dataset: Dataset) -> None:
    """Refuse to train on a data set that has test images only.

    Raises:
        UserError: there are no training images.
    """
    require(
        len(dataset.train) > 0,
        lambda: f"{dataset.name} has no training images, only {len(dataset.test)} test images: it serves evaluation",
    )


def to_unit(pixels: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """Turn uint8 pixels of any shape into float32 in [0, 1]."""
    # By a tensor on the device: given a number, CUDA multiplies by its reciprocal, and other bits come out.
    return pixels.float().div_(torch.full((), 255.0, device=pixels.device))


def class_shares(labels: Labels, size: int) -> Tensor:
    """Return how many of `size` images each class gets, in proportion to its number of labels (N,).

    The largest remainders are rounded up (Hamilton's method), so that the shares sum to `size` exactly.
    """
    counts = labels.cpu().bincount()
    shares = counts * size // len(labels)
    remainders = counts * size % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: size - int(shares.sum())]] += 1
    return shares


def stratified_split(labels: Labels, size: int, seed: int) -> tuple[RowNumbers, RowNumbers]:
    """Draw row numbers without replacement so that every class keeps its share, to within one image.

    Args:
        labels: (N,) int64.
        size: how many to draw, 0 to N.
        seed: of the draw.

    Returns:
        (rest, drawn), (N - size,) and (size,) int64, each ascending, on the CPU.
    """
    labels = labels.cpu()
    counts, shares = labels.bincount(), class_shares(labels, size)
    shuffled = torch.randperm(len(labels), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    place_in_class = torch.arange(len(labels), device="cpu") - (counts.cumsum(0) - counts).repeat_interleave(counts)
    drawn = place_in_class < shares.repeat_interleave(counts)
    return by_class[~drawn].sort().values, by_class[drawn].sort().values


def hold_out(images: Images, held_out: int, seed: int) -> tuple[Images, Images]:
    """Split training images into the rest and a validation set, stratified by class.

    Args:
        images: training images; test images take no part in selecting a model.
        held_out: size of the validation set.
        seed: of the draw.

    Returns:
        (rest, validation), each in the order of `images`.

    Raises:
        UserError: nothing would be held out, or nothing left to train on.
    """
    require(
        0 < held_out < len(images),
        lambda: f"cannot hold out {held_out} of {len(images)} training images: choose from 1 to {len(images) - 1}",
    )
    rest, validation = stratified_split(images.labels, held_out, seed)
    return images.take(rest), images.take(validation)


def stratified_subset(images: Images, size: int, seed: int) -> Images:
    """Draw `size` of the images, stratified by class, in the order they had.

    Raises:
        UserError: there are fewer than `size`, or `size` is not positive.
    """
    require(
        0 < size <= len(images), lambda: f"cannot take {size} of {len(images)} images: choose from 1 to {len(images)}"
    )
    return images.take(stratified_split(images.labels, size, seed)[1])
