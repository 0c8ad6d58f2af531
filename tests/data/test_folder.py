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

from advalign.data import folder, load
from advalign.errors import UserError

COLOURS = {"blue": (0, 0, 255), "green": (0, 255, 0), "red": (255, 0, 0)}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def paint(root: Path, each: int = 5) -> Path:
    """Write sub-folders of plain images, named and coloured alike."""
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (12, 9), colour).save(root / name / f"{number}.png")
    return root


def check_colours(data, part) -> None:
    for image, label in zip(part.pixels, part.labels.tolist(), strict=True):
        assert image.flatten(1).unique(dim=1).tolist() == [[value] for value in COLOURS[data.class_names[label]]]


def test_plain_folder_is_split_by_class(tmp_path: Path):
    data = load(f"folder:{paint(tmp_path / 'mine')}", image_size=8)
    assert data.class_names == ("blue", "green", "red")
    assert data.shape == (3, 8, 8)
    assert data.train.labels.bincount().tolist() == [4, 4, 4]
    assert data.test.labels.bincount().tolist() == [1, 1, 1]
    assert "20 % (3 images)" in data.note
    check_colours(data, data.train)
    check_colours(data, data.test)


@pytest.mark.parametrize("part", ["test", "val"])
def test_train_and_test_folders(tmp_path: Path, part: str):
    root = tmp_path / "mine"
    paint(root / "train")
    paint(root / part, each=2)
    data = load(f"folder:{root}")
    assert (len(data.train), len(data.test), data.note) == (15, 6, "")
    check_colours(data, data.train)
    check_colours(data, data.test)


def test_train_folder_alone_is_split(tmp_path: Path):
    paint(tmp_path / "mine" / "train")
    data = load(f"folder:{tmp_path / 'mine'}")
    assert (len(data.train), len(data.test)) == (12, 3)


def test_images_are_cropped_at_the_centre_and_made_rgb(tmp_path: Path):
    root = tmp_path / "mine"
    paint(root)
    stripes = np.zeros((10, 30), np.uint8)
    stripes[:, 10:20] = 200  # the middle third is what a square crop keeps
    for file in sorted((root / "red").iterdir()):
        Image.fromarray(stripes).save(file)
    data = load(f"folder:{root}", image_size=10)
    assert torch.equal(data.train.take((data.train.labels == 2).nonzero()[:, 0]).pixels.unique(), torch.tensor([200]))


def test_hidden_files_and_other_suffixes_are_left_out(tmp_path: Path):
    root = paint(tmp_path / "mine")
    (root / ".thumbnails").mkdir()
    (root / "red" / "._0.png").write_bytes(b"not an image")
    (root / "red" / "notes.txt").write_text("not an image")
    shutil.copy(root / "red" / "0.png", root / "red" / "5.PNG")
    data = load(f"folder:{root}")
    assert len(data.train) + len(data.test) == 16


def test_the_cache_is_used_until_a_file_changes(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    root = paint(tmp_path / "mine")
    digest = load(f"folder:{root}").digest
    assert len(list(own_cache.iterdir())) == 1

    with monkeypatch.context() as patch:
        patch.setattr(folder, "_pixels", None)  # decoding anything would fail
        data = load(f"folder:{root}")
    assert data.digest == digest
    data.train.pixels.zero_()  # changes the copy in memory alone
    assert load(f"folder:{root}").digest == digest

    os.utime(root / "red" / "0.png", ns=(0, 0))
    assert load(f"folder:{root}").digest == digest
    assert len(list(own_cache.iterdir())) == 2
    assert load(f"folder:{root}", image_size=16).shape == (3, 16, 16)
    assert len(list(own_cache.iterdir())) == 3


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
    assert len(list(own_cache.iterdir())) == 1


def first_of(root: Path, label: int = 2) -> torch.Tensor:
    data = load(f"folder:{root}", image_size=4)
    return data.train.pixels[data.train.labels == label][0]


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
    assert not list(own_cache.iterdir())


@pytest.mark.parametrize("at", [20, -1000, -5, None])
def test_a_damaged_cache_is_made_anew(at: int | None, tmp_path: Path, own_cache: Path):
    root = paint(tmp_path / "mine")
    digest = load(f"folder:{root}").digest
    (cache,) = own_cache.iterdir()
    whole = cache.read_bytes()
    damaged = bytearray(whole[:-1])
    if at is not None:
        damaged = bytearray(whole)
        damaged[at] ^= 1
    cache.write_bytes(damaged)
    assert load(f"folder:{root}").digest == digest
    assert cache.read_bytes() == whole


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path, own_cache: Path):
    root = paint(tmp_path / "mine")
    load(f"folder:{root}")
    (cache,) = own_cache.iterdir()
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


def other_test_classes(root: Path) -> None:
    paint(root / "train")
    paint(root / "test")
    (root / "test" / "red").rename(root / "test" / "pink")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "there is no such folder"),
        (lambda root: root.mkdir(), "has 0 class sub-folders; at least two"),
        (lambda root: (root / "red").mkdir(parents=True), "has 1 class sub-folders; at least two"),
        (lambda root: empty(paint(root) / "red"), r"no images in .*red: looked for \.bmp, .*\.webp"),
        (lambda root: (paint(root) / "red" / "9.jpg").write_bytes(b"?"), r"9\.jpg cannot be read as an image"),
        (lambda root: paint(root, each=1), "too few images to hold out a test set"),
        (other_test_classes, r"test must have the classes of .*train; they differ in \['pink', 'red'\]"),
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
    names = ("$\\foo$", "100% $^$", "[b]", "\u732b")
    for name in names:
        (tmp_path / "mine" / name).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (8, 8), (k, k, k)).save(tmp_path / "mine" / name / f"{k}.png")
    assert load(f"folder:{tmp_path / 'mine'}", image_size=8).class_names == tuple(sorted(names))
