"""`parquet:PATH` and `webdataset:PATH`: the same images as from a folder, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tests.data.folders import write_photos

from advalign.data import Dataset, describe, load
from advalign.errors import UserError

NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))


def photos(root: Path) -> list[tuple[bytes, int]]:
    """The content of the image files below a folder in their order, with labels."""
    folders = sorted(write_photos(root, each=8).iterdir())
    return [(file.read_bytes(), label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())]


def write_parquet(file: Path, images: list[tuple[bytes, int]], *, plain: bool = False, **rename: str) -> None:
    """Write a file as `datasets` does: structures of bytes and path, and the names of the classes beside the schema."""
    content = [image if plain else {"bytes": image, "path": None} for image, _ in images]
    labels = pa.array([label for _, label in images], pa.int64())
    labels = labels.dictionary_encode() if plain else labels
    table = pa.table({rename.get("image", "image"): content, rename.get("label", "label"): labels})
    noted = {"info": {"features": {"label": {"names": NAMES, "_type": "ClassLabel"}}}}
    file.parent.mkdir(exist_ok=True)
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(noted)}), file, row_group_size=5)


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))


def members(images: list[tuple[bytes, int]]) -> dict[str, bytes]:
    named = [
        {f"a/{k:03}.png": image, f"a/{k:03}.cls": f"{label}\n".encode()} for k, (image, label) in enumerate(images)
    ]
    return {name: content for each in named for name, content in each.items()} | {"notes.txt": b"not read"}


def same(data: Dataset, other: Dataset) -> bool:
    """Whether all splits hold the same images in the same order; in Parquet and tar as in the folder's files."""
    pairs = [(getattr(data, split), getattr(other, split)) for split in ("train", "test")]
    return all(torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) for a, b in pairs)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_images_are_those_of_a_folder_and_held_out_alike(kind: str, tmp_path: Path):
    """From two files, whose images are decoded once."""
    images = photos(tmp_path / "photos")
    if kind == "parquet":
        write_parquet(tmp_path / "data" / "a.parquet", images[:13])
        write_parquet(tmp_path / "data" / "b.parquet", images[13:], plain=True)
    else:
        (tmp_path / "data").mkdir()
        write_tar(tmp_path / "data" / "a.tar", members(images[:13]))
        write_tar(tmp_path / "data" / "b.tar", members(images[13:]))
    data = load(f"{kind}:{tmp_path / 'data'}", image_size=9)
    assert same(data, load(f"folder:{tmp_path / 'photos'}", image_size=9))
    assert data.held_out
    assert data.class_names == (tuple(NAMES) if kind == "parquet" else ("0", "1", "2"))
    assert data.named == (kind == "parquet")
    assert len(data.places["train"]) == len(data.train)
    assert (
        f"  train: {len(data.train)} images, from 2 .{'parquet' if kind == 'parquet' else 'tar'} files"
        in describe(data)[1]
    )
    assert load(data.name, image_size=9).digest == data.digest


def test_splits_are_told_by_the_names_of_files_and_folders(tmp_path: Path):
    images = photos(tmp_path / "photos")
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", images[:10])
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", images[10:])
    write_parquet(tmp_path / "data" / "validation-00000-of-00001.parquet", images[3:5])
    (tmp_path / "data" / "test").mkdir()
    write_parquet(tmp_path / "data" / "test" / "0000.parquet", images[:2])
    data = load(f"parquet:{tmp_path / 'data'}", image_size=9)
    assert data.validation is not None
    assert (len(data.train), len(data.validation), len(data.test)) == (24, 2, 2)
    assert torch.equal(data.test.pixels, data.train.pixels[:2])
    assert torch.equal(data.validation.pixels, data.train.pixels[3:5])
    alone = load(f"parquet:{tmp_path / 'data' / 'test'}", image_size=9)
    assert (len(alone.train), len(alone.test)) == (0, 2)


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path):
    images = photos(tmp_path / "photos")
    file = tmp_path / "mine.tar"
    write_tar(file, members(images))
    before = load(f"webdataset:{file}", image_size=9)
    write_tar(file, members([(image, 2 - label) for image, label in images]))
    assert load(f"webdataset:{file}", image_size=9).digest != before.digest


def broken_parquet(root: Path) -> None:
    (root / "x.parquet").write_bytes(b"PAR1 and nothing else")


def without_label(root: Path) -> None:
    write_parquet(root / "x.parquet", photos(root / "photos"), label="class")


def labels_that_are_lists(root: Path) -> None:
    pq.write_table(pa.table({"image": [b""], "label": pa.array([[0]], pa.list_(pa.int64()))}), root / "x.parquet")


def labels_that_are_texts(root: Path) -> None:
    labels = pa.array(["ant", "bee"]).dictionary_encode()
    pq.write_table(pa.table({"image": [b"", b""], "label": labels}), root / "x.parquet")


def label_of_no_class(root: Path) -> None:
    write_parquet(root / "x.parquet", [*photos(root / "photos"), (b"", 3)])


def no_image(root: Path) -> None:
    write_parquet(root / "x.parquet", [*photos(root / "photos"), (b"no image", 0)])


def class_without_images(root: Path) -> None:
    write_parquet(root / "x.parquet", photos(root / "photos")[:9])


def half_named(root: Path) -> None:
    for name in ("train", "other"):
        write_parquet(root / f"{name}.parquet", photos(root / f"photos {name}"))


def compressed_tar(root: Path) -> None:
    with tarfile.open(root / "x.tar", "w:gz"):
        pass


def image_without_label(root: Path) -> None:
    write_tar(root / "x.tar", {"a.png": b"", "a.cls": b"0", "b.png": b""})


def label_that_is_none(root: Path) -> None:
    write_tar(root / "x.tar", {"a.png": b"", "a.cls": b"cat"})


def huge_label(root: Path) -> None:
    write_tar(root / "test.tar", {"a.png": b"", "a.cls": b"999999999"})


def cut_short(root: Path) -> None:
    write_tar(root / "x.tar", {"a.cls": b"0", "a.png": bytes(9000)})
    (root / "x.tar").write_bytes((root / "x.tar").read_bytes()[:3000])


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("parquet", lambda root: None, r"there are no \.parquet files in it"),
        ("parquet", broken_parquet, r"x\.parquet cannot be read"),
        ("parquet", without_label, r"has no column label or fine_label or labels, only image, class"),
        ("parquet", labels_that_are_lists, r"label has list<.*int64> values; labels are integers from 0"),
        ("parquet", labels_that_are_texts, r"label has dictionary<.*> values; labels are integers from 0"),
        ("parquet", label_of_no_class, r"has the label 3, and 3 classes: 0 to 2"),
        ("parquet", no_image, r"x\.parquet\[24\] cannot be read as an image"),
        ("parquet", class_without_images, r"there are no training images of class cow"),
        ("parquet", half_named, r"other\.parquet says no split, and others do"),
        ("webdataset", compressed_tar, r"cannot be read as an uncompressed tar archive"),
        ("webdataset", image_without_label, r"b has no label, b\.cls"),
        ("webdataset", label_that_is_none, r"a\.cls is no label: an integer from 0, as text"),
        ("webdataset", huge_label, r"has the label 999999999; there are at most 1000000 classes"),
        ("webdataset", cut_short, r"x\.tar (is cut short|cannot be read)"),
    ],
)
def test_errors(kind: str, make: Callable[[Path], None], message: str, tmp_path: Path):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        load(f"{kind}:{tmp_path / 'data'}", image_size=9)


def test_a_path_without_its_kind_is_given_one():
    with pytest.raises(UserError, match=r"write parquet:train\.parquet"):
        load("train.parquet")
