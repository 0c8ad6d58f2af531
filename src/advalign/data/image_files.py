"""The image files below a folder: which are read, in which order, and which files are skipped."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unicodedata import normalize

from advalign.errors import UserError

SUFFIXES = (
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
_OF_SYSTEMS = ("@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", "__pycache__")
"""Folders that systems make; some hold thumbnails of the images beside them."""


@dataclass(frozen=True, eq=False)
class ImageFolder:
    """A folder with its image files; hidden files and folders are left out, and those that systems make."""

    path: Path
    images: list[str]
    """The paths of those directly in the folder; texts, as there may be a million."""
    folders: list[ImageFolder]
    """Its sub-folders, in natural order."""
    skipped: Counter[str]
    """What lies directly in the folder and is not read: the number of files by suffix, and of folders by name."""

    @property
    def name(self) -> str:
        """The folder's own name."""
        return normalize("NFC", self.path.name)  # which some file systems and archives take apart

    @cached_property
    def count(self) -> int:
        """The number of images in the folder and below."""
        return len(self.images) + sum(folder.count for folder in self.folders)

    @cached_property
    def every_image(self) -> list[str]:
        """The images in the folder and below, in the order of their paths, folder by folder."""
        return sorted((image for folder in self.every_folder() for image in folder.images), key=_parts)

    def every_folder(self) -> Iterator[ImageFolder]:
        """Yield the folder itself and all below."""
        yield self
        for folder in self.folders:
            yield from folder.every_folder()


def _parts(path: str) -> list[str]:
    return path.split(os.sep)


def scan(path: Path) -> ImageFolder:
    """Read a folder and all below; links to folders are followed, except into a folder that holds them.

    Raises:
        UserError: a folder that cannot be read.
    """
    return _scan(path, (os.path.realpath(path),))


def _scan(path: Path, around: tuple[str, ...]) -> ImageFolder:
    images, folders, skipped = [], [], Counter()
    try:
        with os.scandir(path) as opened:
            entries = list(opened)
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}") from None
    for entry in entries:
        if entry.name.startswith((".", "__MACOSX")) or entry.name in _OF_SYSTEMS:
            skipped[f"{entry.name}/" if entry.is_dir() else "hidden"] += 1
        elif entry.is_dir():
            real = os.path.realpath(entry.path)
            if real not in around:
                folders.append(_scan(path / entry.name, (*around, real)))
        elif entry.is_file():
            suffix = os.path.splitext(entry.name)[1].lower()
            if suffix in SUFFIXES:
                images.append(entry.path)
            else:
                skipped[suffix or "without suffix"] += 1
        elif entry.is_symlink():
            skipped["broken links"] += 1
    return ImageFolder(path, images, sorted(folders, key=lambda folder: natural(folder.name)), skipped)


def natural(name: str) -> tuple[list[str | int], str]:
    """Return the key of natural order, in which 2 comes before 10."""
    parts = re.split(r"(\d+)", name)  # text and numbers alternate, so that parts of one place can be compared
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name
