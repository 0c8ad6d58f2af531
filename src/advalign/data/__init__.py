"""Data sets by name, as uint8 images with labels, and the batches made of them."""

from __future__ import annotations

from pathlib import Path

from advalign.data.arrays import load_npz
from advalign.data.augment.registry import AUGMENTATIONS
from advalign.data.batches import Batches
from advalign.data.cifar import load_cifar
from advalign.data.description import describe
from advalign.data.digits import load_digits
from advalign.data.extra import Extra, load_extra
from advalign.data.folder import load_folder
from advalign.data.images import Dataset, Images, hold_out, stratified_subset
from advalign.data.parquet import load_parquet
from advalign.data.webdataset import load_webdataset
from advalign.errors import UserError, quoted, unknown

__all__ = [
    "AUGMENTATIONS",
    "NAMES",
    "Batches",
    "Dataset",
    "Extra",
    "Images",
    "describe",
    "hold_out",
    "load",
    "load_extra",
    "stratified_subset",
]

NAMES = {
    "digits": "handwritten digits, 8 x 8, 10 classes, embedded (1,297 + 500 images)",
    "cifar10": "CIFAR-10, 32 x 32 RGB, 10 classes (50,000 + 10,000 images)",
    "cifar100": "CIFAR-100, 32 x 32 RGB, 100 classes (50,000 + 10,000 images)",
    "npz:PATH": "your arrays: x_train, y_train and, if you have them, x_val, y_val, x_test, y_test",
    "folder:PATH": "your image files in class sub-folders, or in train/, val/ and test/ with class sub-folders each",
    "folder-classes:PATH": "the same, where each sub-folder is a class, also one named as a split",
    "folder-splits:PATH": "the same, where sub-folders named as splits are splits, and others are left out",
    "folder-test:PATH": "the same, where each sub-folder is a class, and all images are test images",
    "parquet:PATH": "encoded images with labels in Parquet files, as Hugging Face's datasets writes them",
    "webdataset:PATH": "tar archives of image files with .cls labels",
}


def load(name: str, *, directory: Path | str | None = None, image_size: int = 32) -> Dataset:
    """Load a data set; images are uint8 (N, C, H, W) on the CPU.

    Example:
        >>> import advalign as aa
        >>> aa.data.load("digits").shape
        (1, 8, 8)

    Args:
        name: one of `NAMES`, with a path in place of PATH.
        directory: where CIFAR lies; by default ADVALIGN_DATA, else the cache, to which it is downloaded.
        image_size: side to which image files are resized, in folders, Parquet and tar; other data keep their size.

    Raises:
        UserError: unknown name, or data that are missing, corrupt or of the wrong kind.
    """
    match name.split(":", 1):
        case ["digits"]:
            return load_digits()
        case ["cifar10" | "cifar100"]:
            return load_cifar(name, directory)
        case ["npz", path] if path:
            return load_npz(path)
        case ["folder" | "folder-classes" | "folder-splits" | "folder-test" as kind, path] if path:
            return load_folder(path, image_size, kind.removeprefix("folder").removeprefix("-") or "auto")
        case ["parquet", path] if path:
            return load_parquet(path, image_size)
        case ["webdataset", path] if path:
            return load_webdataset(path, image_size)
        case [path] if path and Path(path).is_dir():
            raise UserError(f"unknown data set {quoted(name)}: for images in a folder write folder:{name}")
        case [path] if Path(path).suffix == ".npz":
            raise UserError(f"unknown data set {quoted(name)}: for arrays in a file write npz:{name}")
        case [path] if Path(path).suffix in (".parquet", ".tar"):
            kind = "parquet" if Path(path).suffix == ".parquet" else "webdataset"
            raise UserError(f"unknown data set {quoted(name)}: for images in such a file write {kind}:{name}")
        case _:
            raise unknown("data set", name, NAMES)
