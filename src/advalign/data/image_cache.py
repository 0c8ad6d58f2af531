"""Decoded images in the cache: mapped into memory where they are few, else a file from which batches are read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable
from math import prod
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from advalign.data.cache import Rows, cached_array, cached_file
from advalign.data.images import LARGE, Images, digest_of_image
from advalign.data.stored import ImageFile, StoredImages
from advalign.errors import UserError
from advalign.runtime.memory import free_memory
from advalign.shapes import Labels

T = TypeVar("T")


def cached_images(
    key: str, labels: Labels, size: int, items: Callable[[int], Iterable[T]], decode: Callable[[T], bytes]
) -> Images:
    """Return images (N, 3, size, size) from the cache, decoded in parallel where they are not there.

    Args:
        key: names all that the images depend on.
        labels: (N,) int64.
        items: yields what is decoded, from a row number on.
        decode: returns an image's (3, size, size) bytes.

    Raises:
        UserError: an image that cannot be read, or a cache that cannot be used.
    """
    shape = len(labels), 3, size, size
    name, digests = f"folder-{key}.npy", f"digests-{key}.npy"
    rows = Rows("decoding images", shape, np.uint8, items, decode)
    with warnings.catch_warnings(action="ignore"):  # of the decoders; here, as threads share the filters
        if prod(shape) <= min(LARGE, free_memory(torch.device("cpu")) // 2):
            return Images(torch.from_numpy(cached_array(name, rows)), labels)
        file, begins = cached_file(name, rows, checked_by=digests)
    checked = Rows(
        "reading images", shape[:1], np.uint64, lambda first: range(first, len(labels)),
        lambda row: _digest(file, begins, shape[1:], row),
    )  # fmt: skip
    contents = np.array(cached_array(digests, checked))
    return StoredImages(ImageFile(file, begins, torch.Size(shape), contents), labels)


def _digest(file: Path, begins: int, shape: tuple[int, ...], row: int) -> bytes:
    """Return the digest of an image in the file, as an array holds it."""
    try:
        with file.open("rb", buffering=0) as opened:
            opened.seek(begins + row * prod(shape))
            content = opened.read(prod(shape))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    return digest_of_image(shape, content).to_bytes(8, sys.byteorder)
