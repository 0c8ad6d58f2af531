"""Folder layouts: which names are splits, what is read without asking, and what is refused with both readings."""

from __future__ import annotations

from pathlib import Path

import pytest

from advalign.data.layout import Layout, read_layout
from advalign.data.split_names import split_of
from advalign.errors import UserError


def lay_out(root: Path, *files: str) -> Path:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).mkdir() if file.endswith("/") else (root / file).write_bytes(b"")
    return root


def shown(layout: Layout) -> dict[str, dict[str, list[str]]]:
    return {
        split: {name: [Path(file).name for file in files] for name, files in members.items()}
        for split, members in layout.splits.items()
    }


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", "train Train TRAIN training trains train_set my-train images_train MyTrain trainSet trainset"),
        ("train", "train2017 train.1 2-train"),
        ("test", "test Test tests testing eval Evaluation test_set images-test testData test_images TestSet"),
        ("validation", "val valid validation VALIDATION dev val2017 valset my_val validation-images"),
        (None, "trainers latest contest interval valley invalid device protest steamtrain train_test trainval \u732b"),
    ],
)  # fmt: skip
def test_splits_are_named_by_whole_words_in_any_case(split: str | None, names: str):
    assert {name: split_of(name) for name in names.split()} == dict.fromkeys(names.split(), split)


AS_SPLITS = {"train": {"cat": ["1.png"], "dog": ["2.png"]}, "test": {"cat": ["3.png"], "dog": ["4.png"]}}


@pytest.mark.parametrize(
    "files",
    [
        ("train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png"),
        ("Train/cat/1.png", "Train/dog/2.png", "TEST/cat/3.png", "TEST/dog/4.png"),
        ("training_set/cat/1.png", "training_set/dog/2.png", "test_set/cat/3.png", "test_set/dog/4.png"),
        ("pets-train/cat/1.png", "pets-train/dog/2.png", "pets-eval/cat/a/3.png", "pets-eval/dog/4.png"),
        ("cat/train/1.png", "cat/test/3.png", "dog/train/2.png", "dog/test/4.png"),
        ("cat/Training/1.png", "cat/Tests/3.png", "dog/Training/2.png", "dog/Tests/4.png"),
        (
            "train/cat/1.png", "train/dog/2.png", "test/cat/3.png", "test/dog/4.png", "labels/all.txt",
            ".cache/x/a.png", "__MACOSX/train/cat/1.png",
        ),
    ],
)  # fmt: skip
def test_splits_are_read_above_and_below_the_classes(tmp_path: Path, files: tuple[str, ...]):
    assert shown(read_layout(lay_out(tmp_path, *files))) == AS_SPLITS


@pytest.mark.parametrize("name", ["train", "Test", "val", "dev", "test_tube"])
def test_a_class_may_be_named_as_a_split_is(tmp_path: Path, name: str):
    layout = read_layout(lay_out(tmp_path, "bus/1.png", "car/old/2.png", f"{name}/3.png"))
    assert layout.splits.keys() == {"train"}
    assert set(layout.class_names) == {"bus", "car", name}


def test_a_part_of_a_class_may_be_named_as_a_split_is(tmp_path: Path):
    layout = read_layout(lay_out(tmp_path, "vehicles/bus/1.png", "vehicles/train/2.png", "animals/cat/3.png"))
    assert shown(layout) == {"train": {"animals": ["3.png"], "vehicles": ["1.png", "2.png"]}}


def test_all_three_splits_some_with_some_of_the_classes(tmp_path: Path):
    layout = read_layout(
        lay_out(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "valid/b/4.png", "test/c/5.png")
    )
    assert layout.class_names == ("a", "b", "c")
    assert {split: list(members) for split, members in layout.splits.items()} == {
        "train": ["a", "b", "c"], "validation": ["b"], "test": ["c"],
    }  # fmt: skip
    assert layout.folders == {"train": "train/", "validation": "valid/", "test": "test/"}


def test_classes_are_in_natural_order(tmp_path: Path):
    names = ["1", "2", "10", "class_1", "class_2", "class_10", "v1.9", "v1.10"]
    layout = read_layout(lay_out(tmp_path, *(f"{name}/1.png" for name in sorted(names))))
    assert layout.class_names == tuple(names)


def test_what_is_not_read_is_counted(tmp_path: Path):
    layout = read_layout(
        lay_out(
            tmp_path, "a/1.png", "a/2.HEIC", "a/deep/3.txt", "b/4.jfif", "b/5.gif", "b/.DS_Store", "b/._5.gif", "6.txt",
            "7.png", "b/readme",
        )
    )  # fmt: skip
    assert shown(layout)["train"] == {"a": ["1.png"], "b": ["4.jfif", "5.gif"]}
    assert layout.skipped == {".txt": 2, ".heic": 1, "without suffix": 1, "hidden": 2}
    assert layout.left_out == {f"{tmp_path.name}/": 1}


def test_folders_that_systems_make_are_passed_over_and_counted(tmp_path: Path):
    layout = read_layout(
        lay_out(
            tmp_path, "a/1.png", "b/2.png", "b/.ipynb_checkpoints/2-checkpoint.png", "a/@eaDir/1.png/thumb.jpg",
            "__MACOSX/a/._1.png", "b/@eaDir/x.jpg", "lost+found/", "a/Thumbs.db",
        )
    )  # fmt: skip
    assert shown(layout)["train"] == {"a": ["1.png"], "b": ["2.png"]}
    assert layout.skipped == {".ipynb_checkpoints/": 1, "@eaDir/": 2, "__MACOSX/": 1, "lost+found/": 1, ".db": 1}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (("set/cat/1.png", "set/dog/2.png", "readme.txt"), r"did you mean folder:.*/set\?"),
        (("set/train/a/1.png", "set/train/b/2.png", "set/test/a/3.png"), r"did you mean folder:.*/set\?"),
        (
            ("train/a/1.png", "train/b/2.png", "test/images/3.png"),
            "has not: images; .* sort the images of test/ into class sub-folders, or move it away",
        ),
        (("train/a/1.png", "train/b/2.png", "val/"), "no images in .*/val: looked for .*; remove it if it is no split"),
    ],
)
def test_what_to_do_instead_is_said(files: tuple[str, ...], words: str, tmp_path: Path):
    with pytest.raises(UserError, match=words):
        read_layout(lay_out(tmp_path, *files))


def test_class_folders_without_images_are_named_with_what_they_hold(tmp_path: Path):
    lay_out(tmp_path, "a/1.png", "b/2.png", "empty/", "phone/3.heic", "phone/4.heic")
    with pytest.raises(
        UserError, match=r"no images in .*/empty, .*/phone: looked for \.bmp, .*\.webp, found 2 \.heic; "
    ):
        read_layout(tmp_path)


def test_a_class_that_is_nearly_one_of_training_is_named(tmp_path: Path):
    lay_out(tmp_path, "train/cat/1.png", "train/sea lion/2.png", "test/cat/3.png", "test/Sea-Lion/4.png")
    with pytest.raises(
        UserError, match=r"has not: Sea-Lion; .* are cat, sea lion; is 'Sea-Lion' meant as 'sea lion'\?"
    ):
        read_layout(tmp_path)


AMBIGUOUS = {
    "flat splits": ("train/1.png", "test/2.png"),
    "one flat split": ("train/a/1.png", "train/b/2.png", "test/3.png"),
    "stray images": ("train/a/1.png", "train/b/2.png", "train/3.png", "test/a/4.png"),
    "others beside splits": ("train/a/1.png", "train/b/2.png", "test/a/3.png", "raw/4.png"),
    "a class train with parts": ("bus/day/1.png", "bus/night/2.png", "train/day/3.png", "train/night/4.png"),
    "two splits among classes": ("bus/1.png", "train/2.png", "test/3.png"),
    "two of one split": ("train1/a/1.png", "train1/b/2.png", "train2/a/3.png", "train2/b/4.png"),
    "splits below one class": ("cat/train/1.png", "cat/test/2.png", "dog/3.png"),
    "splits and images below a class": ("cat/train/1.png", "cat/2.png", "dog/train/3.png"),
}


@pytest.mark.parametrize("files", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused_with_both(tmp_path: Path, files: tuple[str, ...]):
    with pytest.raises(UserError, match=r"can be read in two ways, since .*: as \d classes \(.*\), with ") as refusal:
        read_layout(lay_out(tmp_path, *files))
    assert "\n" not in str(refusal.value)
    for layout in ("classes", "splits"):
        assert f"--data folder-{layout}:{tmp_path}" in str(refusal.value)
    classes = read_layout(tmp_path, "classes")
    assert set(classes.class_names) == {file.split("/")[0] for file in files}
    assert sum(len(each) for each in classes.splits["train"].values()) == len(files)


@pytest.mark.parametrize("names", [("entrenamiento", "prueba"), ("fold1", "fold2", "fold3"), ("Lernen", "Pr\u00fcfen")])
def test_sub_folders_that_all_have_the_same_ones_may_be_splits_in_other_words(names: tuple[str, ...], tmp_path: Path):
    lay_out(tmp_path, *(f"{name}/{animal}/1.png" for name in names for animal in ("cat", "dog")))
    words = (
        rf"the same ones in them \(cat, dog\): as {len(names)} classes \(.*\), .*, or as splits, if you name them train"
    )
    with pytest.raises(UserError, match=words):
        read_layout(tmp_path)
    assert set(read_layout(tmp_path, "classes").class_names) == set(names)


@pytest.mark.parametrize(
    "files",
    [
        ("cat/day/1.png", "cat/night/2.png", "dog/day/3.png", "dog/dusk/4.png"),
        ("cat/images/1.png", "dog/images/2.png"),
        ("cat/day/1.png", "cat/night/2.png", "dog/day/3.png", "dog/night/4.png", "dog/5.png"),
    ],
)
def test_sub_folders_that_differ_are_parts_of_classes(files: tuple[str, ...], tmp_path: Path):
    assert read_layout(lay_out(tmp_path, *files)).class_names == ("cat", "dog")


def test_read_as_splits_the_others_are_left_out_and_counted(tmp_path: Path):
    lay_out(tmp_path, *AMBIGUOUS["others beside splits"], "train/5.png", "test/b/6.png")
    layout = read_layout(tmp_path, "splits")
    assert shown(layout) == {"train": {"a": ["1.png"], "b": ["2.png"]}, "test": {"a": ["3.png"], "b": ["6.png"]}}
    assert layout.left_out == {"train/": 1, "raw/": 1}


def test_stray_images_in_the_only_split_are_left_out(tmp_path: Path):
    layout = read_layout(lay_out(tmp_path, "train/a/1.png", "train/b/2.png", "train/3.png"))
    assert shown(layout) == {"train": {"a": ["1.png"], "b": ["2.png"]}}
    assert layout.left_out == {"train/": 1}


def test_read_as_test_every_image_is_a_test_image(tmp_path: Path):
    layout = read_layout(lay_out(tmp_path, "cat/1.png", "dog/2.png", "test/3.png"), "test")
    assert shown(layout) == {"test": {"cat": ["1.png"], "dog": ["2.png"], "test": ["3.png"]}}
    assert shown(read_layout(lay_out(tmp_path / "one", "cat/1.png"), "test")) == {"test": {"cat": ["1.png"]}}


@pytest.mark.parametrize(
    ("files", "layout", "words"),
    [
        (("1.png", "2.png"), "auto", r"has 0 class sub-folders \(2 images lie directly in it\); at least two"),
        (("all/cat/1.png", "all/dog/2.png"), "auto", "has 1 class sub-folder; .*; did you mean folder:.*/all"),
        (("train/1.png", "train/2.png"), "auto", r"has 1 class sub-folder; at least two"),
        (("train/cat/1.png", "test/cat/2.png"), "auto", "train has 1 class sub-folder; at least two"),
        (("train/cat/1.png", "train/dog/2.png", "test/cat/3.txt"), "auto", "no images in .*/test: looked for"),
        (("train/cat/1.png", "train/dog/2.txt", "test/cat/3.png"), "auto", "no images in .*/train/dog: looked for"),
        (("train/a/1.png", "train/b/2.png", "test/c/3.png"), "auto", "test/ has classes that train/ has not: c; "),
        (("cat/train/1.png", "cat/test/2.png", "dog/test/3.png"), "auto", "CLASS/test/ has classes that CLASS/train/"),
        (("cat/1.png", "dog/2.png"), "splits", "has no splits: no sub-folder named train, validation or test"),
        (AMBIGUOUS["two of one split"], "splits", "has two splits of one kind, train1/ and train2/: move one"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(tmp_path: Path, files: tuple[str, ...], layout: str, words: str):
    with pytest.raises(UserError, match=words) as refusal:
        read_layout(lay_out(tmp_path, *files), layout)
    assert "\n" not in str(refusal.value)


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path: Path):
    root = lay_out(tmp_path / "mine", "cat/1.png", "dog/2.png")
    lay_out(tmp_path / "elsewhere", "3.png")
    (root / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (root / "dog" / "again").symlink_to(root)
    assert shown(read_layout(root)) == {"train": {"cat": ["1.png"], "dog": ["2.png", "3.png"]}}
