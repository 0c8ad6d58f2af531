"""Images that do not fit where they are needed: read from a file, or from this machine's memory, as batches ask."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from advalign.data.images import Digests, Images, RowNumbers, digests_of
from advalign.errors import UserError, require
from advalign.runtime import ranks
from advalign.runtime.memory import free_memory, readable_size
from advalign.shapes import Labels

_SHARE = 2  # images take at most one part in so many of the free memory
_log = logging.getLogger("advalign")


@dataclass(frozen=True, eq=False)
class ImageFile:
    """uint8 images one after another in a file, with the digest of each, by which a damaged one is noticed.

    They are read and not mapped: a limit on the address space holds, and a disk that fails is an error and no crash.
    """

    path: Path
    begins: int
    """The first image's first byte."""
    shape: torch.Size
    """(N, C, H, W)."""
    digests: Digests

    dtype = torch.uint8

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: Tensor) -> Tensor:
        """Return the images with these row numbers (n,), in this order, on the CPU.

        Raises:
            UserError: the file cannot be read, or an image in it is damaged.
        """
        pixels = torch.empty(len(rows), *self.shape[1:], dtype=torch.uint8, device="cpu")
        size, numbers = self.shape[1:].numel(), rows.numpy()
        parts = pixels.numpy().reshape(-1).data if len(rows) else memoryview(b"")
        try:
            with self.path.open("rb", buffering=0) as file:
                for place in numbers.argsort(kind="stable").tolist():  # a disk likes to read forwards
                    file.seek(self.begins + int(numbers[place]) * size)
                    if file.readinto(parts[place * size : (place + 1) * size]) != size:
                        raise OSError("it is cut short")
        except OSError as error:
            raise UserError(f"the image cache {self.path} cannot be read: {error.strerror or error}") from error
        damaged = numbers[digests_of(pixels) != self.digests[numbers]]
        require(
            not len(damaged),
            lambda: f"the image cache {self.path} is damaged at image {damaged[0]}: remove it, and it is made anew",
        )
        return pixels


class StoredImages(Images):
    """Images that are read as they are asked for; those of a selection are row numbers until then.

    Labels lie on a device, to which what is read is brought. `pixels` reads all, whatever memory that takes.
    """

    source: ImageFile | Images
    """Where the images are read from; if it is memory, then that of the CPU."""
    rows: RowNumbers
    """(N,), on the CPU: where the images stand in the source."""

    def __init__(self, source: ImageFile | Images, labels: Labels, rows: RowNumbers | None = None) -> None:
        rows = torch.arange(len(labels), device="cpu") if rows is None else rows
        assert rows.shape == labels.shape
        for name, value in {"source": source, "labels": labels, "rows": rows}.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        where = self.source.path if isinstance(self.source, ImageFile) else "memory"
        return f"StoredImages({tuple(self.shape)}, read from {where})"

    @property
    def pixels(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride] (nothing can be assigned to it)
        """All images (N, C, H, W) on the device, read at each call."""
        return self.read()

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return torch.Size((len(self), *self.source.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the pixels."""
        return self.source.dtype

    def take(self, rows: RowNumbers | list[int]) -> StoredImages:
        """Return the images with these row numbers, in this order; nothing is read."""
        rows = torch.as_tensor(rows, dtype=torch.int64)
        return StoredImages(self.source, self.labels[rows.to(self.labels.device)], self.rows[rows.cpu()])

    def to(self, device: torch.device | str) -> StoredImages:
        """Return the images with their labels on a device, to which what is read is brought from then on."""
        return StoredImages(self.source, self.labels.to(device), self.rows)

    def split(self, lengths: Sequence[int]) -> list[Images]:
        """Return so many images after one another each; nothing is read."""
        parts = zip(self.labels.split(list(lengths)), self.rows.split(list(lengths)), strict=True)
        return [StoredImages(self.source, labels, rows) for labels, rows in parts]

    def relabelled(self, labels: Labels) -> StoredImages:
        """Return the same images with other labels (N,)."""
        return StoredImages(self.source, labels, self.rows)

    def read(self, rows: slice | Tensor | None = None) -> Tensor:
        """Return the pixels of the images, or of some, as they are stored (N, C, H, W), on the device."""
        chosen = self.rows if rows is None else self.rows[rows.cpu() if isinstance(rows, Tensor) else rows]
        return self._on_device(self.source.read(chosen))

    def batches(self, rows: Sequence[RowNumbers]) -> Iterator[Images]:
        """Yield images for batches of row numbers (B,) on the CPU; a thread reads the next while one is in use."""
        with ThreadPoolExecutor(1, "advalign-reader") as reader:  # the device is this thread's business alone
            coming = [reader.submit(self.source.read, self.rows[batch]) for batch in rows[:1]]
            for number, batch in enumerate(rows):
                pixels = coming.pop().result()
                coming += [reader.submit(self.source.read, self.rows[each]) for each in rows[number + 1 : number + 2]]
                yield Images(self._on_device(pixels), self.labels[batch.to(self.labels.device)])

    def content(self) -> Iterator[memoryview]:
        """Yield the bytes of all pixels, part by part."""
        for part in self.parts():
            yield self.source.read(self.rows[part]).contiguous().numpy().data

    @cached_property
    def digests(self) -> Digests:
        """As those of `Images`; of a file they were made with it."""
        return self.source.digests[self.rows.numpy()]

    def _on_device(self, pixels: Tensor) -> Tensor:
        device = self.labels.device
        if device.type != "cuda":
            return pixels.to(device)
        return pixels.pin_memory().to(device, non_blocking=True)  # the next step is prepared while it is copied


def on_device(images: Images, device: torch.device) -> Images:
    """Return images on a device: held there if they take at most half of the memory that is free, else read by batch.

    A note says so where they are read. The batches are the same to the bit.
    """
    stored = isinstance(images, StoredImages)
    there = images.labels.device
    if not stored and there.type == device.type and device.index in (None, there.index):
        return images
    free = free_memory(device) // (ranks.on_this_machine() if device.type == "cpu" else 1)
    if images.size * _SHARE <= free:
        if not stored:
            return images.to(device)
        pixels = torch.empty(images.shape, dtype=images.dtype, device=device)
        for part in images.parts():  # the whole may be more than this machine's memory
            pixels[part] = images.read(part)
        held = Images(pixels, images.labels.to(device))
        vars(held)["digests"] = images.digests
        return held
    _log.warning(
        "note: %d images take %s, more than half of the %s that are free on %s: they are read from %s, a batch ahead",
        len(images), readable_size(images.size), readable_size(free), device,
        "the file" if stored and isinstance(images.source, ImageFile) else "this machine's memory",
    )  # fmt: skip
    if stored:
        return images.to(device)
    return StoredImages(images if there.type == "cpu" else images.to("cpu"), images.labels.to(device))


def joined(parts: Sequence[Images]) -> Images:
    """Return the images of all parts, one part after another; of parts of one file, nothing is read."""
    labels = torch.cat([part.labels for part in parts])
    stored = [part for part in parts if isinstance(part, StoredImages)]
    if len(stored) == len(parts) and len({id(part.source) for part in stored}) == 1:
        return StoredImages(stored[0].source, labels, torch.cat([part.rows for part in stored]))
    return Images(torch.cat([part.pixels for part in parts]), labels)
