"""What a data set is: images with labels, a name, a digest; and the one way of drawing part of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float32, Int, UInt8
from torch import Tensor

from advalign.errors import require
from advalign.runtime.files import digest
from advalign.shapes import ImageBatch, Labels

Rows = Int[Tensor, "_"]  # row numbers

SPLIT_SEED = 20_000
"""Seed of every split that belongs to the data set: the same test images in every run, whatever the run's seed."""


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

    def take(self, rows: Rows | list[int]) -> Images:
        """Return a copy of the images with these row numbers, in this order."""
        rows = torch.as_tensor(rows, dtype=torch.int64, device=self.labels.device)
        return Images(self.pixels[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> Images:
        """Return the images on a device; nothing is copied if they are there."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def floats(self, rows: slice | Tensor | None = None) -> ImageBatch:
        """Return the images, or some, as floats (N, C, H, W): uint8 as float32 in [0, 1], floats as they are."""
        pixels = self.pixels if rows is None else self.pixels[rows]
        return pixels if pixels.is_floating_point() else to_unit(pixels)


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

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image, (C, H, W)."""
        _, channels, height, width = self.train.pixels.shape
        return channels, height, width

    @cached_property
    def digest(self) -> str:
        """16 hex digits of the SHA-256 over all pixels and labels; other data under the same name is noticed by it."""
        parts = []
        for images in (self.train, self.test):
            parts.append(repr(tuple(images.pixels.shape)))
            parts += [tensor.cpu().contiguous().numpy().data for tensor in (images.pixels, images.labels)]
        return digest(*parts)


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


def stratified_split(labels: Labels, size: int, seed: int) -> tuple[Rows, Rows]:
    """Draw row numbers without replacement so that every class keeps its share, to within one image.

    The largest remainders are rounded up (Hamilton's method), so that the shares sum to `size` exactly.

    Args:
        labels: (N,) int64.
        size: how many to draw, 0 to N.
        seed: of the draw.

    Returns:
        (rest, drawn), (N - size,) and (size,) int64, each ascending, on the CPU.
    """
    labels = labels.cpu()
    counts = labels.bincount()
    shares = counts * size // len(labels)
    remainders = counts * size % len(labels)
    shares[remainders.argsort(descending=True, stable=True)[: size - int(shares.sum())]] += 1

    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    place_in_class = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
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


def split_for_test(labels: Labels, source: str) -> tuple[Rows, Rows]:
    """Draw the fixed fifth that serves as test set where none was brought along.

    Args:
        labels: (N,) int64, each class from 0 present.
        source: the name of the data in the error.

    Returns:
        Row numbers (train, test), each ascending.

    Raises:
        UserError: some class would have no training image left.
    """
    require(
        len(labels) >= 5 and int(labels.bincount().min()) >= 2,
        lambda: f"{source}: too few images to hold out a test set: at least 5, and 2 of each class, are needed",
    )
    return stratified_split(labels, len(labels) // 5, SPLIT_SEED)


def note_on_test(size: int) -> str:
    """Return the note on a data set whose test set `split_for_test` has drawn."""
    return f"no test set was given: a fixed, stratified 20 % ({size} images) was held out as test set"
