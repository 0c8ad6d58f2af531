"""Common corruptions: the published files of CIFAR-10-C and CIFAR-100-C, checked before they are believed.

Hendrycks and Dietterich 2019 (ICLR). A folder has `labels.npy` and a file for each type, uint8 (50000, 32, 32, 3): the
10,000 test images in their order at severity 1, then at 2, up to 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advalign.data.corrupt import CORRUPTIONS, LIBRARIES, corrupt
from advalign.data.images import Dataset, Images
from advalign.errors import UserError, quoted, require, shorten
from advalign.runtime.files import digest, full_path

SEVERITIES = (1, 2, 3, 4, 5)
TYPES = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 of the benchmark; the four further ones that the archives hold do not count."""
MADE_HERE = "c-like"
_ALIKE = 0.25  # correlation of an image with what it was made of; one in seven has it with another of CIFAR-10's
_SHARE = 0.8  # of images that are alike, at least; of fog made here, severity 5, 0.96, of other types all
_FLAT = 0.01  # of images in one colour, at most; the 200 looked at of each type made here had none
_ROUNDING = 1e-6  # of the length of an image in a single value, less its mean
_SAMPLE = 200  # images that are looked at, of each type and severity


@dataclass(frozen=True)
class Corruptions:
    """Corrupted images of a data set's test images."""

    name: str
    """`cifar10-c`, `cifar100-c`, or `c-like` for those that are made here."""
    types: tuple[str, ...]
    """Those that there are, of `TYPES`."""
    images: Callable[[str, int, Tensor], Tensor]
    """Of a type, a severity and row numbers (N,) of the test images: the corrupted images, uint8 (N, C, H, W)."""
    folder: str = ""
    """The name of the folder that published files were read from."""
    files: Mapping[str, str] = field(default_factory=dict)
    """The digest of each published file, by type."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """The versions of what has made the images here."""

    @property
    def missing(self) -> tuple[str, ...]:
        """The types that there are none of."""
        return tuple(each for each in TYPES if each not in self.types)

    def cells(self) -> Iterator[tuple[str, int]]:
        """Yield each type with each severity."""
        yield from ((kind, severity) for kind in self.types for severity in SEVERITIES)


def find_corruptions(spelling: str, data: Dataset) -> Corruptions:
    """Return the corruptions that a spelling names, of a data set: `cifar10-c:DIR`, `cifar100-c:DIR` or `c-like`.

    Raises:
        UserError: another spelling or another data set; files that are not what they should be.
    """
    if spelling == MADE_HERE:
        require(
            data.shape == (3, 32, 32) and data.test.dtype == torch.uint8,
            lambda: f"{MADE_HERE} is for 8-bit colour images of 32 x 32, as its constants are; {data.name} has others",
        )
        return Corruptions(MADE_HERE, tuple(CORRUPTIONS), lambda *cell: _made(data.test, *cell), libraries=LIBRARIES)
    name, _, path = spelling.partition(":")
    if name not in ("cifar10-c", "cifar100-c") or not path:
        raise UserError(f"unknown corruptions {quoted(spelling)}: write cifar10-c:DIR, cifar100-c:DIR or {MADE_HERE}")
    require(
        data.name == name.removesuffix("-c"),
        lambda: f"{name} is made of the test images of {name.removesuffix('-c')}, not of {data.name}",
    )
    return read_corruptions(name, Path(path), data)


def read_corruptions(name: str, folder: Path, data: Dataset) -> Corruptions:
    """Check the files of a folder, and return the corruptions that it has, with the digest of each file.

    Raises:
        UserError: the folder or its labels are missing, or a file has another shape, type or order of images.
    """
    require(folder.is_dir(), lambda: f"no folder {str(folder)!r}: unpack the archive, and name the folder in it")
    labels, n = _mapped(folder / "labels.npy"), len(data.test)
    expected = data.test.labels.cpu().numpy()
    fits = labels.shape == (5 * n,) and labels.dtype.kind in "iu"
    require(
        fits and bool((labels.reshape(5, n) == expected).all()),
        lambda: f"{folder / 'labels.npy'} has not the labels of the {n} test images of {data.name}, five times",
    )
    files = {kind: _mapped(folder / f"{kind}.npy") for kind in TYPES if (folder / f"{kind}.npy").is_file()}
    require(bool(files), lambda: f"{folder} has none of the corruptions: it should have {TYPES[0]}.npy and others")
    channels, height, width = data.shape
    for kind, array in files.items():
        require(
            array.shape == (5 * n, height, width, channels) and array.dtype == np.uint8,
            lambda: (
                f"{folder / kind}.npy has {array.dtype} values of shape {array.shape}, not uint8 of "
                f"{(5 * n, height, width, channels)}"
            ),
        )
        _require_order(folder / f"{kind}.npy", array, data.test)

    def images(kind: str, severity: int, rows: Tensor) -> Tensor:
        first = (severity - 1) * n
        slice_ = files[kind][first : first + n]
        return torch.from_numpy(np.ascontiguousarray(slice_[rows.numpy()].transpose(0, 3, 1, 2)))

    digests = {kind: digest(array.reshape(-1).data) for kind, array in files.items()}
    return Corruptions(name, tuple(files), images, full_path(folder).name, digests)


def _mapped(path: Path) -> NDArray[np.generic]:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except Exception as error:  # of numpy, for whatever is no array
        raise UserError(f"{path} cannot be read: {shorten(' '.join(str(error).split()))}") from error


def _require_order(path: Path, array: NDArray[np.generic], test: Images) -> None:
    """Refuse images that do not look like the test images in whose place they stand, at any severity."""
    rows = np.linspace(0, len(test) - 1, min(len(test), _SAMPLE)).astype(int)
    clean = _centred(test.floats(torch.from_numpy(rows).to(test.labels.device)).cpu().numpy())
    for severity in SEVERITIES:
        pixels = array[(severity - 1) * len(test) + rows].astype(np.float32).transpose(0, 3, 1, 2)
        corrupted = _centred(pixels)
        flat = float(np.mean(~corrupted.any(1)))
        require(
            flat <= _FLAT,
            lambda: f"{path} is damaged: at severity {severity}, {100 * flat:.0f} % of the images have a single value",
        )
        alike = float(np.mean((corrupted * clean).sum(1) > _ALIKE))
        require(
            alike >= _SHARE,
            lambda: (
                f"{path} has other images, or in another order: at severity {severity} only {100 * alike:.0f} % "
                f"correlate with the test images by {_ALIKE}, and {100 * _SHARE:.0f} % must"
            ),
        )


def _centred(images: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return images (N, C, H, W) as rows of mean 0 and length 1, whose product is the correlation; flat ones as 0."""
    rows = images.reshape(len(images), -1).astype(np.float64)
    rows -= rows.mean(1, keepdims=True)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > _ROUNDING)


def _made(test: Images, kind: str, severity: int, rows: Tensor) -> Tensor:
    """Corrupt test images here; what is drawn for an image depends on its row alone."""
    made = [
        corrupt(image.cpu().permute(1, 2, 0).numpy(), kind, severity, seed=row)
        for row, image in zip(rows.tolist(), test.read(rows.to(test.labels.device)), strict=True)
    ]
    return torch.from_numpy(np.stack(made).transpose(0, 3, 1, 2).copy())
