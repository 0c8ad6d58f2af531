"""CIFAR-10 and CIFAR-100 in the official binary layout: downloaded if missing, checked, read. No pickle is executed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from advalign.data.cache import cache_folder
from advalign.data.images import Dataset, Images
from advalign.errors import UserError, require

if TYPE_CHECKING:
    from rich.progress import Progress

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Release:
    """One of the authors' archives, and what its files must be."""

    folder: str
    url: str
    md5: str
    names: str
    """The file with the class names, one in a line."""
    labels: int
    """Label bytes before each image; the last one counts (CIFAR-100: coarse, then fine)."""
    train: dict[str, str]
    """Training files, in order, with their MD5."""
    test: dict[str, str]


RELEASES = {
    "cifar10": Release(
        folder="cifar-10-batches-bin",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        names="batches.meta.txt",
        labels=1,
        train={
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
        },
        test={"test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d"},
    ),
    "cifar100": Release(
        folder="cifar-100-binary",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        names="fine_label_names.txt",
        labels=2,
        train={"train.bin": "6172c7755cfe09b2fe270c85cebc1b15"},
        test={"test.bin": "4499cfba6c016c1be1438163640a0898"},
    ),
}


def load_cifar(name: str, directory: Path | str | None = None) -> Dataset:
    """Return 50,000 training and 10,000 test images, (N, 3, 32, 32), every file checked against its MD5.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009.

    Args:
        name: `cifar10`, or `cifar100` with its 100 fine labels.
        directory: holds the release's folder, or is it; by default what ADVALIGN_DATA names, else the cache, into which
            the release is then downloaded if it is missing.

    Raises:
        UserError: files missing or corrupt, or no way to download them.
    """
    release = RELEASES[name]
    chosen = directory or os.environ.get("ADVALIGN_DATA")
    folder = _find(name, release, Path(chosen)) if chosen else _find_or_download(name, release)
    class_names = tuple((folder / release.names).read_text().split())
    train, test = _read(folder, release.train, release.labels), _read(folder, release.test, release.labels)
    return Dataset(name, train, test, class_names)


def _find(name: str, release: Release, root: Path) -> Path:
    """Return the folder with the release's files: one below root, or root itself."""
    wanted = [*release.train, *release.test, release.names]
    missing = {
        folder: [file for file in wanted if not (folder / file).is_file()] for folder in (root / release.folder, root)
    }
    nearest = min(missing, key=lambda folder: len(missing[folder]))
    if missing[nearest]:
        raise UserError(
            f"{name} is not in {root}: looked in {root / release.folder} and {root} and did not find "
            f"{', '.join(missing[nearest])}; {release.url} holds them"
        )
    return nearest


def _find_or_download(name: str, release: Release) -> Path:
    import pooch
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    pooch.get_logger().setLevel("WARNING")  # the progress bar says what is downloaded
    console = Console(stderr=True)
    root = cache_folder()
    try:
        return _find(name, release, root)
    except UserError:  # not there yet, or unpacked only in part
        pass
    columns = TextColumn("{task.description}"), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            pooch.retrieve(
                release.url,
                f"md5:{release.md5}",
                fname=release.url.rpartition("/")[2],
                path=root,
                processor=pooch.Untar(extract_dir="."),
                progressbar=_Bar(progress, f"downloading {name}"),  # pyright: ignore[reportArgumentType]  annotated bool
            )
    except (OSError, ValueError) as error:  # the network's errors are OSErrors; a wrong checksum is a ValueError
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} could not be downloaded: fetch {release.url} by hand, unpack it and give its folder with "
            f"--data-dir ({reason})"
        ) from error
    return _find(name, release, root)


def _read(folder: Path, files: dict[str, str], labels: int) -> Images:
    records = []
    for file, expected in files.items():
        content = (folder / file).read_bytes()
        checksum = md5(content, usedforsecurity=False).hexdigest()
        require(
            checksum == expected,
            lambda: (
                f"{folder / file} is corrupt or cut short: {len(content)} bytes with MD5 {checksum}, where the "
                f"official file has MD5 {expected}; delete it and fetch it again"
            ),
        )
        records.append(np.frombuffer(content, np.uint8).reshape(-1, labels + PIXELS))
    pixels = np.concatenate([record[:, labels:] for record in records]).reshape(-1, 3, 32, 32)
    fine = np.concatenate([record[:, labels - 1] for record in records]).astype(np.int64)
    return Images(torch.from_numpy(pixels), torch.from_numpy(fine))


class _Bar:
    """What pooch asks of a progress bar, drawn by rich."""

    def __init__(self, progress: Progress, title: str) -> None:
        self.total = 0  # pooch sets it when the server has answered
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def update(self, size: int) -> None:
        self._progress.update(self._task, advance=size, total=self.total)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        """Nothing: whoever opened the display closes it, also after an error, of which pooch does not tell."""
