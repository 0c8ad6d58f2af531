"""An image file to the pixels that are kept of it: upright, RGB, resized, cropped at the centre."""

from __future__ import annotations

from typing import BinaryIO

import numpy as np

from advalign.errors import UserError, require, shorten

LARGEST = 100_000_000
"""Pixels at most of an image file: a file of a few kilobytes can say that it has billions, and decoding takes memory
for them, 4 bytes each."""
_LARGEST_SIDE = 10_000  # of images in the cache
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # by content; Pillow starts programs for some others


def check_size(size: int) -> None:
    """Refuse a side to which images cannot be resized."""
    require(1 <= size <= _LARGEST_SIDE, lambda: f"image size {size} must be positive, and at most {_LARGEST_SIDE}")


def preprocessing(size: int) -> dict[str, str]:
    """Return what `decode` does to an image, in words."""
    return {
        "orientation": "upright by EXIF",
        "channels": "RGB",
        "alpha": "dropped",
        "resize": f"shorter side to {size}, bicubic",
        "crop": f"{size} x {size} at the centre",
    }


def decode(source: str | BinaryIO, name: str, size: int) -> bytes:
    """Return one image as (3, size, size) bytes.

    Args:
        source: a file's path, or its content.
        name: what the image is called in errors.

    Raises:
        UserError: it cannot be read, or says that it has more pixels than are allowed.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(source, formats=_FORMATS) as image:
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
            f"{name} cannot be read as an image: it has more than {LARGEST // 10**6} million pixels"
        ) from error
    except Exception as error:  # Pillow's decoders raise whatever a damaged file leads them to
        reason = shorten(" ".join(f"{error}".split())) or type(error).__name__
        raise UserError(f"{name} cannot be read as an image: {reason}") from error
    return np.asarray(square).transpose(2, 0, 1).tobytes()
