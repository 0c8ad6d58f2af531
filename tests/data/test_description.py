"""What is said of a user's data before any work: splits, classes with counts, copies, skipped files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from advalign.data import describe, load


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))


def save(file: Path, number: int) -> None:
    """Write the image of a number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(file)


def test_a_folder_in_splits(tmp_path: Path):
    root = tmp_path / "mine"
    for number, name in enumerate(
        ["Train/cat/a", "Train/cat/b", "Train/dog/c", "val/dog/d", "Test/cat/e", "Test/dog/f"]
    ):
        save(root / f"{name}.png", number)
    save(root / "Test" / "dog" / "copy.bmp", 0)  # of another class's image, in another format
    save(root / "val" / "cat" / "copy.png", 2)
    (root / "Train" / "cat" / "notes.txt").write_text("")
    assert describe(load(f"folder:{root}", image_size=8)) == [
        f"folder:{root}: 2 classes: cat, dog",
        "  train: 3 images, from Train/ (cat 2, dog 1)",
        "  validation: 2 images, from val/ (cat 1, dog 1)",
        "  test: 3 images, from Test/ (cat 1, dog 2)",
        "  1 file skipped: 1 .txt",
        "  copies: 1 of 3 test images are also train images; advalign evaluate leaves them out",
        "  copies: 1 of 2 validation images are also train images",
        "  2 images are in two classes or more, such as Train/cat/a.png and Test/dog/copy.bmp",
    ]


def doubts(root: Path) -> list[str]:
    """What is said of a folder behind its splits."""
    return [line for line in describe(load(f"folder:{root}", image_size=8)) if "images, " not in line][1:]


def test_a_link_that_puts_images_in_a_second_class_is_noticed(tmp_path: Path):
    for number in range(8):
        save(tmp_path / "mine" / ("one", "two")[number % 2] / f"{number}.png", number)
    assert doubts(tmp_path / "mine") == []
    (tmp_path / "mine" / "two" / "more").symlink_to("../one")
    parts, line = doubts(tmp_path / "mine")
    assert parts == "  images in sub-folders of a class belong to it: two/more"
    assert re.fullmatch(r"  4 images are in two classes or more, such as one/\d.png and two/more/\d.png", line)


def test_classes_that_differ_in_case_or_spaces_are_noticed(tmp_path: Path):
    for number in range(4):
        save(tmp_path / "mine" / "sea lion" / f"{number}.png", number)
        save(tmp_path / "mine" / "Sea_Lion" / f"{number}.png", 4 + number)
    assert doubts(tmp_path / "mine") == ["  classes 'Sea_Lion' and 'sea lion' differ in case or spaces alone"]


@pytest.mark.parametrize(
    ("test", "said"),
    [
        (np.array([0, 1], np.uint8), "1 of 255 in test"),  # masks
        (np.array([0, 4095], np.uint16), "16 of 255 in test"),  # 12 bits in 16
        (np.array([0, 200], np.uint8), ""),
        (np.array([0, 65535], np.uint16), ""),
    ],
)
def test_values_that_fill_a_part_of_their_range_are_noticed(test: np.ndarray, said: str, tmp_path: Path):
    for number in range(4):
        save(tmp_path / "train" / "ab"[number % 2] / f"{number}.png", number)
        (tmp_path / "test" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        stripes = np.tile(test, (8, 4))
        stripes[number] = test[0]
        Image.fromarray(stripes).save(tmp_path / "test" / "ab"[number % 2] / f"{number}.png")
    lines = doubts(tmp_path)
    assert [line.partition(":")[0] for line in lines] == (
        [f"  images are dark, the highest value is {said}"] if said else []
    )


def test_dark_arrays_are_noticed_in_the_scale_of_their_type(tmp_path: Path):
    x, y = np.random.default_rng(0).random((8, 4, 4)), np.arange(8) % 2
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x / 255, y_test=y)
    assert describe(load(f"npz:{tmp_path / 'mine.npz'}"))[-1].startswith(
        f"  images are dark, the highest value is {x.max() / 255:.3g} of 1 in test: scale values"
    )


def test_equal_arrays_of_two_classes_are_named_by_their_rows(tmp_path: Path):
    x, y = np.random.default_rng(0).integers(0, 256, (9, 4, 4), np.uint8), np.arange(9) % 2
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_test=x[4:6], y_test=y[:2] * 0)
    assert describe(load(f"npz:{tmp_path / 'mine.npz'}"))[-1] == (
        "  1 image is in two classes or more, such as x_train[5] and x_test[1]"
    )
    np.savez(tmp_path / "mine.npz", x_train=np.repeat(x, 3, 0), y_train=np.repeat(y, 3) ^ (np.arange(27) == 8))
    line = describe(load(f"npz:{tmp_path / 'mine.npz'}"))[-1]
    assert re.fullmatch(r"  1 image is in .* such as x_train\[6\] and x_train\[8\]", line)


def test_many_classes_are_shortened_and_held_out_images_are_said_to_be_so(tmp_path: Path):
    for label in range(20):
        for number in range(4 + label):
            save(tmp_path / "mine" / f"k{label}" / f"{number}.png", 100 * label + number)
    head, train, test = describe(load(f"folder:{tmp_path / 'mine'}", image_size=8))
    assert head.endswith(": 20 classes: k0, k1, k2, k3, k4, k5, k6, ... k19")
    assert "images, from class sub-folders (from " in train
    assert "held out of class sub-folders by their content, about 20 % (from " in test


def test_arrays_and_data_sets_that_are_built_in(tmp_path: Path):
    x, y = np.random.default_rng(0).integers(0, 256, (9, 4, 4), np.uint8), np.arange(9) % 2
    np.savez(tmp_path / "mine.npz", x_train=x, y_train=y, x_val=x[:2], y_val=y[:2], x_test=x[:3] // 2, y_test=y[:3])
    assert describe(load(f"npz:{tmp_path / 'mine.npz'}")) == [
        f"npz:{tmp_path / 'mine.npz'}: 2 classes: 0, 1",
        "  train: 9 images, x_train (0 5, 1 4)",
        "  validation: 2 images, x_val (0 1, 1 1)",
        "  test: 3 images, x_test (0 2, 1 1)",
        "  copies: 2 of 2 validation images are also train images",
    ]
    assert describe(load("digits")) == []
