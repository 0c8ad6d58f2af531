"""`folder:PATH`: layout, decoding, the cache, and what is refused."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from advalign.data import Images, folder, load
from advalign.errors import UserError
from advalign.runtime.sealed import Owner, seal_npy

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paint(root: Path, each: int = 5) -> Path:
    """Write sub-folders of plain images, named and coloured alike; no two files are the same."""
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (12 + number, 9), colour).save(root / name / f"{number}.png")
    return root


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob("folder-*.npy"))


def check_colours(data, part) -> None:
    for image, label in zip(part.pixels, part.labels.tolist(), strict=True):
        assert image.flatten(1).unique(dim=1).tolist() == [[value] for value in COLOURS[data.class_names[label]]]


def test_the_data_say_what_was_done_to_their_images(tmp_path: Path):
    """An image of 30 x 20 with the colour of its middle inside and alpha 0: what the words say is what comes out."""
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for k in range(5):
            image = Image.new("RGBA", (30, 20), (9, 9, 9 + k, 255))
            image.paste((*colour, 0), (5, 0, 25, 20))
            image.save(tmp_path / name / f"{k}.png")
    data = load(f"folder:{tmp_path}", image_size=8)
    assert data.preprocessing == {
        "orientation": "upright by EXIF", "channels": "RGB", "alpha": "dropped",
        "resize": "shorter side to 8, bicubic", "crop": "8 x 8 at the centre",
    }  # fmt: skip
    for part in (data.train, data.test):
        check_colours(data, Images(part.pixels[..., 1:-1], part.labels))  # at the edges, resizing mixes with the rim


def test_plain_folder_is_split_by_class(tmp_path: Path):
    data = load(f"folder:{paint(tmp_path / 'mine')}", image_size=8)
    assert data.class_names == ("blue", "green", "red")
    assert data.shape == (3, 8, 8)
    assert (data.train.labels.bincount() + data.test.labels.bincount()).tolist() == [5, 5, 5]
    assert data.train.labels.bincount().min() >= 1 <= data.test.labels.bincount().min()
    assert data.held_out
    assert f"{len(data.test)} of 15 images, about 20 %, were held out" in data.note
    check_colours(data, data.train)
    check_colours(data, data.test)


def test_train_and_test_folders(tmp_path: Path):
    root = tmp_path / "mine"
    paint(root / "train")
    paint(root / "test", each=2)
    data = load(f"folder:{root}")
    assert (len(data.train), len(data.test), data.note, data.validation, data.held_out) == (15, 6, "", None, False)
    check_colours(data, data.train)
    check_colours(data, data.test)


def test_a_validation_folder_is_the_validation_set_and_never_the_test_set(tmp_path: Path):
    root = tmp_path / "mine"
    paint(root / "train")
    paint(root / "val", each=2)
    without_test = load(f"folder:{root}")
    assert without_test.held_out
    assert len(without_test.train) + len(without_test.test) == 15
    assert without_test.validation is not None
    assert len(without_test.validation) == 6
    check_colours(without_test, without_test.validation)
    paint(root / "test", each=1)
    data = load(f"folder:{root}")
    assert (len(data.train), len(data.validation or ()), len(data.test)) == (15, 6, 3)
    (root / "val" / "red" / "0.png").unlink()
    assert load(f"folder:{root}").digest != data.digest


@pytest.mark.parametrize("parts", [("test",), ("val",), ("test", "val")])
def test_without_training_images_there_is_a_test_set_alone(tmp_path: Path, parts: tuple[str, ...]):
    for part in parts:
        paint(tmp_path / "mine" / part, each=3 if part == parts[0] else 1)
    data = load(f"folder:{tmp_path / 'mine'}", image_size=8)
    assert (data.train.pixels.shape, len(data.test), data.validation) == ((0, 3, 8, 8), 9, None)
    assert data.class_names == ("blue", "green", "red")
    assert not data.held_out
    check_colours(data, data.test)


def test_train_folder_alone_is_split(tmp_path: Path):
    paint(tmp_path / "mine" / "train")
    data = load(f"folder:{tmp_path / 'mine'}")
    assert data.held_out
    assert len(data.train) + len(data.test) == 15


def test_images_are_cropped_at_the_centre_and_made_rgb(tmp_path: Path):
    root = tmp_path / "mine"
    paint(root)
    for number, file in enumerate(sorted((root / "red").iterdir())):
        stripes = np.full((10, 30), number, np.uint8)
        stripes[:, 10:20] = 200  # the middle third is what a square crop keeps
        Image.fromarray(stripes).save(file)
    data = load(f"folder:{root}", image_size=10)
    assert torch.equal(data.train.take((data.train.labels == 2).nonzero()[:, 0]).pixels.unique(), torch.tensor([200]))


def test_hidden_files_and_other_suffixes_are_left_out(tmp_path: Path):
    root = paint(tmp_path / "mine")
    (root / ".thumbnails").mkdir()
    (root / "red" / "._0.png").write_bytes(b"not an image")
    (root / "red" / "notes.txt").write_text("not an image")
    (root / "red" / "readme").write_text("not an image")
    shutil.copy(root / "red" / "0.png", root / "red" / "5.PNG")
    data = load(f"folder:{root}")
    assert len(data.train) + len(data.test) == 16
    assert data.remarks == ("3 files skipped: 1 hidden, 1 .txt, 1 without suffix", "folders skipped: 1 .thumbnails/")


def test_a_class_that_is_named_as_a_split_is_read_with_a_hint(tmp_path: Path):
    root = paint(tmp_path / "mine")
    (root / "red").rename(root / "test_images")
    hint = "test_images/ is read as a class, since images lie directly in it: if it is none, move it away"
    assert load(f"folder:{root}", image_size=8).remarks == (hint,)
    assert load(f"folder-classes:{root}", image_size=8).remarks == ()


def test_the_cache_is_used_until_a_file_changes(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    root = paint(tmp_path / "mine")
    digest = load(f"folder:{root}").digest
    assert len(caches(own_cache)) == 1

    with monkeypatch.context() as patch:
        patch.setattr(folder, "decode", None)  # decoding anything would fail
        patch.setattr(folder, "_file_digest", None)
        data = load(f"folder:{root}")
    assert data.digest == digest
    data.train.pixels.zero_()  # changes the copy in memory alone
    assert load(f"folder:{root}").digest == digest

    os.utime(root / "red" / "0.png", ns=(0, 0))
    assert load(f"folder:{root}").digest == digest
    assert len(caches(own_cache)) == 2
    assert load(f"folder:{root}", image_size=16).shape == (3, 16, 16)
    assert len(caches(own_cache)) == 3


def test_folders_whose_files_have_the_same_names_sizes_and_dates_have_caches_of_their_own(tmp_path: Path):
    plain = tmp_path / "plain"
    paint(plain)
    inverse = tmp_path / "inverse"
    shutil.copytree(plain, inverse)
    (inverse / "red").rename(inverse / "swapped")
    (inverse / "blue").rename(inverse / "red")
    (inverse / "swapped").rename(inverse / "blue")
    for root in (plain, inverse):
        for file in root.glob("*/*.png"):
            file.write_bytes(file.read_bytes().ljust(500, b"\0"))  # plain colours compress to different sizes
            os.utime(file, ns=(0, 0))
    first, second = load(f"folder:{plain}"), load(f"folder:{inverse}")
    check_colours(first, first.train)
    reds = second.train.pixels[second.train.labels == second.class_names.index("red")]
    assert reds.amax((0, 2, 3)).tolist() == [0, 0, 255]


def test_the_name_holds_from_any_directory(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    root = paint(tmp_path / "mine")
    here = f"folder:{os.path.realpath(root)}"
    for directory, name in [(tmp_path, "mine"), (root, "."), (root / "red", "../../mine/")]:
        monkeypatch.chdir(directory)
        assert load(f"folder:{name}").name == here
    monkeypatch.chdir("/")
    assert load(here).name == here
    assert len(caches(own_cache)) == 1


def first_of(root: Path, label: int = 2) -> torch.Tensor:
    """Return an image of a class, at the size at which it was written."""
    data = load(f"folder:{root}", image_size=4)
    return data.train.pixels[data.train.labels == label][0]


def make_files_differ(root: Path) -> None:
    """Add bytes behind each image, which no decoder reads."""
    for number, file in enumerate(sorted(root.iterdir())):
        file.write_bytes(file.read_bytes() + bytes([number]))


STEPS = np.repeat(np.array([[0, 1, 100, 255]], np.uint8), 4, 0)


def write_pgm(file: Path, deep: np.ndarray) -> None:
    file.with_suffix(".ppm").write_bytes(b"P5 4 4 65535\n" + deep.astype(">u2").tobytes())


@pytest.mark.parametrize(
    "write",
    [
        lambda file, deep: Image.fromarray(deep).save(file),
        lambda file, deep: Image.fromarray(deep).save(file.with_suffix(".tiff")),
        lambda file, deep: Image.frombytes("I;16B", (4, 4), deep.astype(">u2").tobytes()).save(
            file.with_suffix(".tif")
        ),
        write_pgm,
    ],
    ids=["png", "tiff", "big-endian tiff", "pgm"],
)
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, write: Callable[[Path, np.ndarray], object]):
    root = paint(tmp_path / "mine")
    empty(root / "red")
    for number in range(5):
        write(root / "red" / f"{number}.png", np.minimum(STEPS.astype(int) * 257 + 100, 65535).astype(np.uint16))
    make_files_differ(root / "red")
    expected = torch.from_numpy(STEPS).expand(3, 4, 4)  # v of 255 is 257 v of 65535; 100 more is less than half a level
    assert torch.equal(first_of(root), expected)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, dtype: type):
    root = paint(tmp_path / "mine")
    Image.fromarray(STEPS.astype(dtype)).save(root / "red" / "9.tiff")
    with pytest.raises(
        UserError, match=r"red/9\.tiff cannot be read as an image: .*save it with 8 or 16 bits"
    ) as caught:
        load(f"folder:{root}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(
    ("orientation", "stored"),  # as the EXIF standard says where row 0 and column 0 of the stored pixels belong
    [
        (1, lambda upright: upright),
        (2, np.fliplr),
        (3, lambda upright: np.rot90(upright, 2)),
        (4, np.flipud),
        (5, np.transpose),  # row 0 is the left side, column 0 the top
        (6, np.rot90),  # row 0 is the right side, column 0 the top: stored turned to the left
        (8, lambda upright: np.rot90(upright, -1)),
    ],
)
def test_images_are_turned_upright(
    tmp_path: Path, orientation: int, stored: Callable[[np.ndarray], np.ndarray], deep: bool
):
    root = paint(tmp_path / "mine")
    upright = np.arange(16, dtype=np.uint8).reshape(4, 4) * 10
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.ascontiguousarray(stored(upright))
    image = Image.fromarray(pixels.astype(np.uint16) * 257 if deep else pixels)
    for file in (root / "red").iterdir():
        image.save(file, exif=exif)
    make_files_differ(root / "red")
    assert torch.equal(first_of(root), torch.from_numpy(upright).expand(3, 4, 4))


def test_both_parts_are_slices_of_one_mapping(tmp_path: Path):
    data = load(f"folder:{paint(tmp_path / 'mine')}")
    storages = {part.pixels.untyped_storage().data_ptr() for part in (data.train, data.test)}
    assert len(storages) == 1


def test_a_failure_leaves_no_cache_behind(tmp_path: Path, own_cache: Path):
    root = paint(tmp_path / "mine")
    (root / "red" / "4.png").write_bytes((root / "red" / "4.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"4\.png cannot be read as an image"):
        load(f"folder:{root}")
    assert not caches(own_cache)
    assert not list(own_cache.glob(".*"))


@pytest.mark.parametrize("kind", ["folder", "files"])
@pytest.mark.parametrize("at", [20, -300, -5, None])
def test_a_damaged_cache_is_made_anew(at: int | None, kind: str, tmp_path: Path, own_cache: Path):
    root = paint(tmp_path / "mine")
    digest = load(f"folder:{root}").digest
    (cache,) = own_cache.glob(f"{kind}-*.npy")
    whole = cache.read_bytes()
    damaged = bytearray(whole[:-1])
    if at is not None:
        damaged = bytearray(whole)
        damaged[at] ^= 1
    cache.write_bytes(damaged)
    assert load(f"folder:{root}").digest == digest
    assert cache.read_bytes() == whole


def test_a_cache_of_something_else_is_made_anew(tmp_path: Path, own_cache: Path):
    root = paint(tmp_path / "mine")
    digest = load(f"folder:{root}").digest
    (cache,) = caches(own_cache)
    whole = cache.read_bytes()
    with cache.open("w+b") as file:
        np.save(file, np.zeros((2, 3)))
        seal_npy(file, Owner(cache.name, ""))
    assert load(f"folder:{root}").digest == digest
    assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path, own_cache: Path):
    root = paint(tmp_path / "mine")
    load(f"folder:{root}")
    (cache,) = caches(own_cache)
    cache.unlink()
    cache.mkdir()
    with pytest.raises(UserError, match=rf"image cache .*{cache.name} cannot be used: .*ADVALIGN_CACHE"):
        load(f"folder:{root}")


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, own_cache: Path):
    own_cache.write_text("a file where a folder should be")
    with pytest.raises(UserError, match=r"image cache .* cannot be used: .*ADVALIGN_CACHE"):
        load(f"folder:{paint(tmp_path / 'mine')}")


def empty(file_of: Path) -> None:
    for file in file_of.iterdir():
        file.unlink()


def copies_only(root: Path) -> None:
    for file in (paint(root) / "red").iterdir():
        if file.name != "0.png":
            shutil.copy(root / "red" / "0.png", file)


def other_test_classes(root: Path) -> None:
    paint(root / "train")
    paint(root / "test")
    (root / "test" / "red").rename(root / "test" / "pink")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "there is no such folder"),
        (lambda root: root.mkdir(), "has 0 class sub-folders; at least two"),
        (lambda root: (root / "red").mkdir(parents=True), "has 1 class sub-folder; at least two"),
        (lambda root: empty(paint(root) / "red"), r"no images in .*red: looked for \.bmp, .*\.webp"),
        (lambda root: (paint(root) / "red" / "9.jpg").write_bytes(b"?"), r"9\.jpg cannot be read as an image"),
        (
            lambda root: paint(root, each=1),
            "too few images to hold out a test set: 2 different .*only one of blue, green, red$",
        ),
        (copies_only, "too few images to hold out a test set: 2 different ones of each class are .*only one of red$"),
        (lambda root: root.write_text(""), "mine: it is a file and no folder; unpack it"),
        (
            other_test_classes,
            r"test/ has classes that train/ has not: pink; those of train/ are blue, green, red",
        ),
    ],
)
def test_errors(tmp_path: Path, make: Callable[[Path], object], message: str):
    make(tmp_path / "mine")
    with pytest.raises(UserError, match=message) as caught:
        load(f"folder:{tmp_path / 'mine'}")
    assert "\n" not in str(caught.value)


def test_image_size_must_be_positive(tmp_path: Path):
    with pytest.raises(UserError, match="image size 0 must be positive"):
        load(f"folder:{paint(tmp_path / 'mine')}", image_size=0)


def png(width: int, height: int) -> bytes:
    """Return a file of a few bytes that says it is an image of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = chunk(b"IHDR", width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0]))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (12_000, 12_000), (10_001, 10_000)])
def test_an_image_that_says_it_is_huge_is_refused_before_it_is_decoded(tmp_path: Path, width: int, height: int):
    root = paint(tmp_path / "mine")
    (root / "red" / "9.png").write_bytes(png(width, height))
    with pytest.raises(UserError, match=r"red/9\.png cannot be read as an image: .* more than 100 million"):
        load(f"folder:{root}")


@pytest.mark.parametrize(
    "content", [b"", b"\x89PNG\r\n\x1a\n", png(3, 3)[:40], png(0, 0), b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_damaged_images_are_refused_in_a_line(tmp_path: Path, content: bytes):
    root = paint(tmp_path / "mine")
    (root / "red" / "9.png").write_bytes(content)
    with pytest.raises(UserError, match=r"red/9\.png cannot be read as an image: .") as caught:
        load(f"folder:{root}")
    assert "\n" not in str(caught.value)


def test_any_name_of_a_folder_is_a_class(tmp_path: Path):
    names = ("100% $^$", "$\\foo$", "[b]", "\u732b")
    for name in names:
        (tmp_path / "mine" / name).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path / "mine" / name / f"{k}.png")
    assert load(f"folder:{tmp_path / 'mine'}", image_size=8).class_names == names
