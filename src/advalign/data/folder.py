"""A user's own image files in class sub-folders, decoded once into a memory-mapped cache."""

from __future__ import annotations

import json
import mmap
import warnings
from pathlib import Path

import numpy as np
import torch

from advalign.data.cache import cache_folder
from advalign.data.images import Dataset, Images, note_on_test, split_for_test
from advalign.errors import UserError, require, shorten
from advalign.runtime.files import digest, written_atomically
from advalign.runtime.sealed import Owner, check_sealed, seal_npy

LARGEST = 100_000_000
"""Pixels at most of an image file: a file of a few kilobytes can say that it has billions, and decoding takes memory
for them, 4 bytes each."""
_LARGEST_SIDE = 10_000  # of images in the cache
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; Pillow starts programs for some others


def load_folder(path: Path | str, image_size: int) -> Dataset:
    """Return the images below a folder: `PATH/CLASS/...`, or `PATH/train/CLASS/...` with `PATH/test` or `PATH/val`.

    Images are turned upright (EXIF), converted to RGB, 16 bits scaled to 8, resized so that the shorter side is
    `image_size` (bicubic), cropped at the centre, and kept as uint8 in a cache, which is made anew when a file's name,
    size or date changes. An image file has at most 100 million pixels. Without test folder, a fixed fifth of the images
    is held out.

    Returns:
        Images (N, 3, image_size, image_size), mapped from the cache, not held in memory; drawing part of them, as a
        training does to hold out its validation set, copies that part into memory.

    Raises:
        UserError: no such folder, no images in it, fewer than two classes, other classes in the test folder, an image
            that cannot be read, or a cache that cannot be written.
    """
    root = Path(path).expanduser().resolve()
    name = f"folder:{root}"
    require(root.is_dir(), lambda: f"{name}: there is no such folder")
    require(
        1 <= image_size <= _LARGEST_SIDE,
        lambda: f"image size {image_size} must be positive, and at most {_LARGEST_SIDE}",
    )
    train_root = root / "train" if (root / "train").is_dir() else root
    test_root = next((root / part for part in ("test", "val") if train_root != root and (root / part).is_dir()), None)

    classes = _listing(train_root)
    files, labels = _flat(classes)
    if test_root is None:
        kept, held_out = split_for_test(labels, name)
        # Training images first, so that both parts are slices of the cache, not copies of it.
        order = torch.cat([kept, held_out])
        files, labels, n_train = [files[row] for row in order.tolist()], labels[order], len(kept)
        note = note_on_test(len(held_out))
    else:
        test_classes = _listing(test_root)
        differing = sorted(classes.keys() ^ test_classes.keys())
        require(not differing, lambda: f"{test_root} must have the classes of {train_root}; they differ in {differing}")
        test_files, test_labels = _flat(test_classes)
        files, labels, n_train = files + test_files, torch.cat([labels, test_labels]), len(files)
        note = ""
    pixels = _decoded(root, files, image_size)
    train, test = Images(pixels[:n_train], labels[:n_train]), Images(pixels[n_train:], labels[n_train:])
    return Dataset(name, train, test, tuple(classes), note)


def _listing(root: Path) -> dict[str, list[Path]]:
    """Return the image files of each class, everything in the order of names."""
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    require(
        len(folders) > 1,
        lambda: f"{root} has {len(folders)} class sub-folders; at least two are needed, with images in them",
    )
    classes = {
        folder.name: sorted(
            file
            for file in folder.rglob("*")
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
        )
        for folder in folders
    }
    for name, files in classes.items():
        require(bool(files), lambda: f"no images in {root / name}: looked for {', '.join(SUFFIXES)}")
    return classes


def _flat(classes: dict[str, list[Path]]) -> tuple[list[Path], torch.Tensor]:
    files = [file for members in classes.values() for file in members]
    counts = torch.tensor([len(members) for members in classes.values()])
    return files, torch.arange(len(classes)).repeat_interleave(counts)


def _decoded(root: Path, files: list[Path], size: int) -> torch.Tensor:
    """Return the files' pixels, (N, 3, size, size), decoding them if the cache lacks them."""
    states = [(file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = digest(json.dumps([str(root), states, size]))
    cache = cache_folder() / f"folder-{key}.npy"
    try:
        if not _is_whole(cache):
            _write(cache, files, size)
        # Copy-on-write: torch wants writable memory, and the file stays as it is.
        return torch.from_numpy(np.load(cache, mmap_mode="c"))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(
            f"the image cache {cache} cannot be used: free space, delete it, or set ADVALIGN_CACHE to "
            f"another folder ({error})"
        ) from error


def _is_whole(cache: Path) -> bool:
    """Tell whether the cache is there and undamaged; one that is not is made anew."""
    if not cache.is_file() or not cache.stat().st_size:
        return False
    with cache.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            return check_sealed(content, cache, _owner(cache))
        except UserError:
            return False


def _owner(cache: Path) -> Owner:
    return Owner(cache.name, "remove it")


def _write(cache: Path, files: list[Path], size: int) -> None:
    """Write the cache, whole or not at all, and sealed."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, size, size)}
    with written_atomically(cache) as draft:
        np.lib.format.write_array_header_1_0(draft, header)
        for file in files:  # written, not memory-mapped: on a full disk a mapping ends the process with SIGBUS
            draft.write(_pixels(file, size))
        seal_npy(draft, _owner(cache))


def _pixels(file: Path, size: int) -> bytes:
    """Return one image as (3, size, size) bytes."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > LARGEST:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {LARGEST // 10**6} million")
            deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
            if image.mode in ("I", "F") and not deep:
                raise ValueError(f"the range of its pixels (mode {image.mode}) is not known; save it with 8 or 16 bits")
            upright = ImageOps.exif_transpose(image)
            if deep:  # convert would clip at 255
                upright = Image.fromarray(np.rint(np.asarray(upright) / 257).astype(np.uint8))
            square = ImageOps.fit(upright.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    except Image.DecompressionBombError as error:  # Pillow's own bound, above ours
        raise UserError(
            f"{file} cannot be read as an image: it has more than {LARGEST // 10**6} million pixels"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = shorten(" ".join(f"{error}".split())) or type(error).__name__
        raise UserError(f"{file} cannot be read as an image: {reason}") from error
    return np.asarray(square).transpose(2, 0, 1).tobytes()
