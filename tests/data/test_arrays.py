"""`npz:PATH`: what is read, and what is refused with which words."""

from __future__ import annotations

import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from advalign.data import load
from advalign.errors import UserError

DRAW = np.random.default_rng(0)
GREY = DRAW.integers(0, 256, (12, 5, 4), np.uint8)
COLOUR = DRAW.integers(0, 256, (12, 3, 5, 4), np.uint8)
LABELS = np.arange(12) % 3


def saved(folder: Path, **arrays: Any) -> str:
    np.savez(folder / "mine.npz", **arrays)
    return f"npz:{folder / 'mine.npz'}"


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (GREY, GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (COLOUR, COLOUR),
        (COLOUR.transpose(0, 2, 3, 1), COLOUR),
        (COLOUR / 255, COLOUR),
        ((COLOUR / 255).astype(np.float32), COLOUR),
        ((COLOUR / 255).astype(np.float16), COLOUR),
    ],
)
def test_every_layout_and_type_gives_the_same_images(tmp_path: Path, x: np.ndarray, expected: np.ndarray):
    data = load(saved(tmp_path, x_train=x, y_train=LABELS, x_test=x[:4], y_test=LABELS[:4].astype(np.uint8)))
    assert torch.equal(data.train.pixels, torch.from_numpy(expected))
    assert torch.equal(data.test.pixels, torch.from_numpy(expected[:4]))
    assert data.train.labels.tolist() == LABELS.tolist()
    assert data.class_names == ("0", "1", "2")
    assert data.note == ""


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_are_not_rounded(tmp_path: Path, dtype: type):
    x = DRAW.random((12, 1, 5, 4)).astype(dtype)
    train = load(saved(tmp_path, x_train=x, y_train=LABELS, x_test=COLOUR[:4, :1], y_test=LABELS[:4])).train
    assert train.pixels.dtype == torch.float32
    assert torch.equal(train.floats(), torch.from_numpy(x.astype(np.float32)))


def test_one_float_between_two_levels_keeps_all_of_them(tmp_path: Path):
    x = (GREY / 255).astype(np.float32)
    x[3, 2, 1] = np.nextafter(x[3, 2, 1], np.float32(0.5))
    data = load(saved(tmp_path, x_test=x, y_test=LABELS))
    assert np.array_equal(data.test.floats()[:, 0].numpy(), x)


def test_floats_that_leave_the_range_by_rounding_are_brought_back(tmp_path: Path):
    x = np.linspace(-1e-7, 1 + 2e-7, 240).reshape(12, 5, 4)
    data = load(saved(tmp_path, x_test=x, y_test=LABELS))
    assert data.test.floats().min() == 0
    assert data.test.floats().max() == 1


def test_test_arrays_alone_serve_evaluation(tmp_path: Path):
    data = load(saved(tmp_path, x_test=COLOUR, y_test=LABELS * 2))
    assert (len(data.train), len(data.test)) == (0, 12)
    assert data.shape == (3, 5, 4)
    assert data.test.labels.tolist() == (LABELS * 2).tolist()
    assert (data.class_names, data.named) == (("0", "1", "2", "3", "4"), False)


def test_classes_may_have_names(tmp_path: Path):
    names = np.array(["cat", "dog", "owl"])
    data = load(saved(tmp_path, **GOOD, class_names=names))
    assert (data.class_names, data.named) == (("cat", "dog", "owl"), True)
    alone = load(saved(tmp_path, x_test=COLOUR[:1], y_test=LABELS[:1], class_names=names))
    assert (alone.class_names, alone.named) == (("cat", "dog", "owl"), True)


def test_the_name_holds_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path, **GOOD)
    (tmp_path / "sub").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    here = f"npz:{os.path.realpath(tmp_path)}/mine.npz"
    for directory, name in [
        (tmp_path, "mine.npz"),
        (tmp_path / "sub", "../mine.npz"),
        (tmp_path / "sub", "~/mine.npz"),
    ]:
        monkeypatch.chdir(directory)
        assert load(f"npz:{name}").name == here
    monkeypatch.chdir("/")
    assert load(here).name == here


def test_without_test_arrays_a_fixed_fifth_is_held_out_and_said_so(tmp_path: Path):
    name = saved(tmp_path, x_train=np.repeat(GREY, 5, 0), y_train=np.repeat(LABELS, 5))
    data = load(name)
    assert data.held_out
    assert len(data.train) + len(data.test) == 60
    copies = {image.numpy().tobytes() for image in data.test.pixels}
    assert len(copies) * 5 == len(data.test)  # copies of an image are on one side
    assert copies.isdisjoint(image.numpy().tobytes() for image in data.train.pixels)
    assert f"{len(data.test)} of 60 images, about 20 %, were held out by their content" in data.note
    assert load(name).digest == data.digest


GOOD = {"x_train": COLOUR, "y_train": LABELS, "x_test": COLOUR[:4], "y_test": LABELS[:4]}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"x_train": COLOUR / 100}, r"x_train has floats from 0 to 2\.55; they must lie in \[0, 1\]"),
        ({"x_train": COLOUR / 255 - 1}, r"x_train has floats from -1 to 0"),
        ({"x_test": np.full((4, 3, 5, 4), np.nan)}, r"x_test has floats from nan to nan"),
        ({"x_train": COLOUR.astype(np.int64)}, r"x_train has int64 values; images are uint8, or floats"),
        ({"x_train": COLOUR.reshape(12, -1)}, r"x_train has shape \(12, 60\); images are \(N, H, W\)"),
        ({"x_train": COLOUR[:, :2]}, r"x_train has shape \(12, 2, 5, 4\)"),
        ({"x_train": COLOUR[:0], "y_train": LABELS[:0]}, r"x_train has shape \(0, 3, 5, 4\)"),
        ({"x_test": COLOUR[:4, :, :3]}, r"\(C, H, W\) = \(3, 5, 4\) in x_train, but \(3, 3, 4\) in x_test"),
        ({"y_train": LABELS[:11]}, r"x_train has 12 images, but y_train 11 labels"),
        ({"y_train": LABELS / 2}, r"y_train has float64 values; labels are integers from 0"),
        ({"y_train": np.eye(12)}, r"y_train has shape \(12, 12\); labels are \(N,\)"),
        ({"y_train": LABELS - 1}, r"y_train has the label -1; labels are integers from 0"),
        ({"y_train": LABELS * 2}, r"y_train must hold every class from 0 to its highest, but has no 1"),
        ({"y_train": LABELS + 10**12}, r"y_train must hold every class .* has no 0"),
        ({"y_train": LABELS * 0}, r"y_train has one class only"),
        ({"y_test": LABELS[:4] + 5}, r"y_test has class 7, which y_train has not"),
        ({"y_train": LABELS.astype(object)}, r"mine.npz cannot be read: .*allow_pickle"),
        ({"y_train": None}, r"mine.npz: y_train missing; it must hold x_train and y_train"),
        ({"x_train": None}, r"mine.npz: x_train missing; .* x_test and y_test, or all four"),
        (dict.fromkeys(("x_train", "y_train", "x_test", "y_test")), r"mine.npz: x_train and y_train missing"),
        ({"y_test": None}, r"mine.npz: y_test missing"),
        ({"x_train": None, "y_train": None, "y_test": None}, r"mine.npz: y_test missing"),
        ({"class_names": np.array(["a", "b"])}, r"class_names names 2 classes, but y_train has 3"),
        ({"class_names": np.array(["a", "b", "a"])}, r"class_names has a name twice"),
        ({"class_names": np.arange(3)}, r"class_names has int64 values of shape \(3,\); it must be texts \(K,\)"),
        (
            {"x_train": None, "y_train": None, "class_names": np.array(["a", "b"])},
            r"y_test has class 2, which class_names has not",
        ),
        ({"x_test": None, "y_test": None, "y_train": np.minimum(np.arange(12), 1)}, r"too few images to hold out"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str):
    arrays = {key: value for key, value in {**GOOD, **wrong}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        load(saved(tmp_path, **arrays))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "instead"),
    [
        ({"x_train": COLOUR.astype(np.float32)}, "save x / 255"),
        ({"x_train": COLOUR / 127.5 - 1}, "save (x + 1) / 2 if -1 is black, or undo what normalised them"),
        (
            {"x_train": (COLOUR - 120.0) / 60},
            "undo what normalised them, as a normalisation belongs inside the network",
        ),
        ({"x_train": COLOUR.astype(np.int64)}, "save x.astype(np.uint8)"),
        ({"x_train": COLOUR > 127}, "save x.astype(np.uint8) * 255"),
        ({"x_train": COLOUR.astype(np.uint16) * 257}, "save x / 65535, or by what else their highest value can be"),
        ({"x_train": np.repeat(COLOUR[:, :1], 4, 1)}, "save x[:, :3]"),
        ({"x_train": np.repeat(COLOUR[:, 0, :, :, None], 4, 3)}, "save x[..., :3]"),
        ({"y_train": np.eye(3)[LABELS]}, "save y.argmax(1), as they are one-hot"),
        ({"y_train": LABELS[:, None]}, "save y[:, 0]"),
        ({"y_train": LABELS * 1.0}, "save y.astype(int)"),
        ({"y_train": LABELS > 0}, "save y.astype(int)"),
        ({"class_names": np.array([b"a", b"b", b"c"])}, "save class_names.astype(str)"),
        (
            {"class_names": np.array(["a", "b", "c"], object)},
            "save numbers, of one shape each, or texts as with .astype(str)",
        ),
        ({"x_val": COLOUR}, "y_val missing; x_val and y_val belong together"),
        ({"y_train": LABELS.astype(str)}, "save class_names, y_train = np.unique(y, return_inverse=True)"),
        ({"y_train": LABELS + 1}, "has no 0; they count from 1: save y - 1"),
        ({"y_train": LABELS * 2}, "has no 1; np.unique(y, return_inverse=True)[1] counts them so"),
        ({"x_train": None, "X_train": COLOUR}, "x_train missing; .* has X_train: save those under these names"),
    ],
)
def test_what_to_write_instead_is_said(tmp_path: Path, wrong: dict[str, Any], instead: str):
    arrays = {key: value for key, value in {**GOOD, **wrong}.items() if value is not None}
    with pytest.raises(UserError) as caught:
        load(saved(tmp_path, **arrays))
    assert re.search(re.escape(instead).replace(r"\.\*", ".*") + "$", str(caught.value))


def test_arrays_that_are_not_read_and_labels_from_one_are_said(tmp_path: Path):
    data = load(saved(tmp_path, x_train=np.repeat(COLOUR, 5, 0), y_train=np.repeat(LABELS, 5), X_test=COLOUR, Y=LABELS))
    assert data.remarks == ("arrays that are not read: X_test, Y",)
    assert load(saved(tmp_path, **GOOD)).remarks == ()
    alone = load(saved(tmp_path, x_test=COLOUR, y_test=LABELS + 1))
    assert alone.remarks == ("no label is 0, and each from 1 to 3 is there: labels count from 0",)


def test_wrong_files_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="there is no such file"):
        load(f"npz:{tmp_path / 'absent.npz'}")
    with pytest.raises(UserError, match=f"there is no such file, but a folder: write folder:{tmp_path}"):
        load(f"npz:{tmp_path}")

    with zipfile.ZipFile(tmp_path / "net.pt", "w") as archive:
        archive.writestr("net/data.pkl", "")
    with pytest.raises(UserError, match=r"is a zip archive without arrays: write it with numpy\.savez"):
        load(f"npz:{tmp_path / 'net.pt'}")
    whole = Path(saved(tmp_path, **GOOD).removeprefix("npz:")).read_bytes()
    middle = len(whole) // 4
    np.save(tmp_path / "array.npy", GREY)
    for content, message in [
        (whole[:-100], "is not an .npz file, or is cut short"),
        (b"", "is not an .npz file, or is cut short"),
        ((tmp_path / "array.npy").read_bytes(), "is not an .npz file, or is cut short"),
        (whole[:middle] + bytes(100) + whole[middle + 100 :], "cannot be read: .*CRC"),
    ]:
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=message):
            load(f"npz:{tmp_path / 'bad.npz'}")
