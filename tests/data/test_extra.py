"""Generated images: read from the file as they are drawn, in a fixed share of each batch; what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from advalign.data import Batches, Extra, Images, load_extra
from advalign.data import extra as extra_file
from advalign.errors import UserError

SHAPE = (3, 5, 4)
N = 60
DRAW = np.random.default_rng(0)
COLOUR = DRAW.integers(0, 256, (N, *SHAPE), np.uint8)
GREY = DRAW.integers(0, 256, (N, 6, 4), np.uint8)
LABELS = np.arange(N) % 7


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(folder: Path, packed: bool = False, **arrays: Any) -> Path:
    (np.savez_compressed if packed else np.savez)(folder / "more.npz", **arrays)
    return folder / "more.npz"


def loaded(path: Path, shape: tuple[int, int, int] = SHAPE, classes: int = 7) -> Extra:
    return load_extra(path, shape, classes, "toy")


def mapped(array: np.ndarray) -> bool:
    """Whether an array is a view of a memory map, and no copy."""
    base: Any = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return isinstance(base, np.memmap)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keys", [("image", "label"), ("x_train", "y_train")])
@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (COLOUR, COLOUR),
        (COLOUR.transpose(0, 2, 3, 1), COLOUR),
        (np.asfortranarray(COLOUR), COLOUR),
        (np.ascontiguousarray(COLOUR.transpose(0, 2, 3, 1)), COLOUR),
        (GREY, GREY[:, None]),
        (GREY[:, None], GREY[:, None]),
        (GREY[..., None], GREY[:, None]),
    ],
)
def test_every_layout_is_mapped_and_never_loaded(
    tmp_path: Path, stored: np.ndarray, expected: np.ndarray, keys: tuple[str, str], packed: bool
):
    shape = expected.shape[1], expected.shape[2], expected.shape[3]
    extra = loaded(saved(tmp_path, packed, **dict(zip(keys, (stored, LABELS), strict=True))), shape)
    assert mapped(extra.pixels)
    assert mapped(extra.labels)
    assert not extra.pixels.flags.writeable
    assert extra.pixels.shape == expected.shape
    np.testing.assert_array_equal(extra.pixels, expected)
    rows = torch.tensor([5, 0, 59, 5, 17])
    taken = extra.take(rows)
    assert torch.equal(taken.pixels, torch.from_numpy(expected)[rows])
    assert taken.labels.tolist() == LABELS[rows].tolist()


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.uint16, ">i4"])
def test_labels_of_any_whole_type(tmp_path: Path, dtype: Any):
    extra = loaded(saved(tmp_path, image=COLOUR, label=LABELS.astype(dtype)))
    assert extra.take(torch.arange(N)).labels.tolist() == LABELS.tolist()
    assert extra.digest == loaded(saved(tmp_path, image=COLOUR, label=LABELS)).digest


def test_a_packed_file_is_unpacked_once_under_its_content(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    path = saved(tmp_path, packed=True, image=COLOUR, label=LABELS)
    digest = loaded(path).digest
    written = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(written) == 2
    other = tmp_path / "elsewhere.npz"
    path.rename(other)
    assert loaded(other).digest == digest
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == written
    assert loaded(saved(tmp_path, packed=True, image=255 - COLOUR, label=LABELS)).digest != digest
    assert len(list(cache.iterdir())) == 3  # the labels are the same
    stored = loaded(saved(tmp_path, image=COLOUR, label=LABELS))
    assert stored.digest == digest
    monkeypatch.setenv("ADVALIGN_CACHE", str(path))
    with pytest.raises(
        UserError, match=r"cannot be unpacked to .*more.npz/extra-.* set ADVALIGN_CACHE to another"
    ) as e:
        loaded(other)
    assert "\n" not in str(e.value)


def test_the_digest_sees_labels_layout_free_and_images_at_equal_distances(tmp_path: Path):
    original = loaded(saved(tmp_path, image=COLOUR, label=LABELS)).digest
    assert loaded(saved(tmp_path, image=COLOUR.transpose(0, 2, 3, 1), label=LABELS)).digest == original
    changed = COLOUR.copy()
    changed[-1, 0, 0, 0] += 1
    others = [(changed, LABELS), (COLOUR, LABELS[::-1]), (COLOUR[:-1], LABELS[:-1])]
    digests = {loaded(saved(tmp_path, image=x, label=y)).digest for x, y in others}
    assert len(digests | {original}) == 4


def test_many_images_are_read_in_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file far larger than what is looked at: loading reads headers and labels, the digest 1,024 images."""
    n = 20_000
    x = np.broadcast_to(COLOUR[:1], (n, *SHAPE))
    extra = loaded(saved(tmp_path, image=x, label=np.zeros(n, np.int64)))
    rows: list[int] = []

    class Watched(np.ndarray):
        def __getitem__(self, row: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            rows.extend(np.atleast_1d(row).tolist())
            return np.asarray(self)[row]

    watched = Extra(extra.pixels.view(Watched), extra.labels)
    _ = watched.digest
    assert len(rows) == 1024
    assert (rows[0], rows[-1]) == (0, n - 1)
    rows.clear()
    batches = Batches(real(400), 100, augment="flip", seed=0, extra=watched, extra_share=0.7)
    list(batches.epoch(0))
    assert len(rows) == 4 * 70


GOOD = {"image": COLOUR, "label": LABELS}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image": None}, "must hold image and label, or x_train and y_train, not label"),
        ({"image": None, "label": None, "images": COLOUR}, "must hold image and label, .* not images"),
        ({"image": COLOUR / 255}, "image has float64 values; generated images are uint8, 0 to 255"),
        ({"image": COLOUR.astype(np.int64)}, "image has int64 values"),
        ({"image": COLOUR.astype(object)}, "image has object values"),
        (
            {"image": COLOUR[:, :1]},
            r"image has shape \(60, 1, 5, 4\), but with toy it must be \(N, 3, 5, 4\) or \(N, 5",
        ),
        ({"image": COLOUR[:, :, :4]}, r"image has shape \(60, 3, 4, 4\)"),
        ({"image": GREY}, r"image has shape \(60, 6, 4\)"),
        ({"image": COLOUR.reshape(N, -1)}, r"image has shape \(60, 60\)"),
        ({"image": np.uint8(3)}, r"image has shape \(\)"),
        ({"image": COLOUR[:0], "label": LABELS[:0]}, r"image has shape \(0, 3, 5, 4\)"),
        ({"label": LABELS[:59]}, r"label has shape \(59,\), but there are 60 images, with one label for each"),
        ({"label": np.eye(N)}, r"label has shape \(60, 60\)"),
        ({"label": LABELS / 2}, "label has float64 values; labels are integers from 0"),
        ({"label": LABELS + 1}, "label has the label 7, but toy has the classes 0 to 6"),
        ({"label": LABELS - 1}, "label has the label -1, but toy has the classes 0 to 6"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str):
    arrays = {key: value for key, value in {**GOOD, **wrong}.items() if value is not None}
    with pytest.raises(UserError, match=message) as caught:
        loaded(saved(tmp_path, **arrays))
    assert "\n" not in str(caught.value)
    assert "more.npz" in str(caught.value)


def test_a_wrong_packed_file_is_refused_before_it_is_unpacked(tmp_path: Path, cache: Path):
    with pytest.raises(UserError, match="float64"):
        loaded(saved(tmp_path, packed=True, image=COLOUR / 255, label=LABELS))
    assert not cache.exists()


def test_wrong_files_are_refused(tmp_path: Path, cache: Path):
    for absent in (tmp_path / "absent.npz", tmp_path):
        with pytest.raises(UserError, match="there is no such file"):
            loaded(absent)
    whole = saved(tmp_path, **GOOD).read_bytes()
    np.save(tmp_path / "array.npy", COLOUR)
    for content in (whole[:-100], b"", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UserError, match=r"is not an .npz file, or is cut short"):
            loaded(tmp_path / "bad.npz")
    many = DRAW.integers(0, 256, (4000, *SHAPE), np.uint8)
    packed = bytearray(saved(tmp_path, packed=True, image=many, label=np.arange(4000) % 7).read_bytes())
    packed[100_000:100_100] = bytes(100)
    (tmp_path / "bad.npz").write_bytes(packed)
    with pytest.raises(UserError, match="cannot be read: "):
        loaded(tmp_path / "bad.npz")
    assert cache.is_dir()
    assert not list(cache.iterdir())  # no draft either
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("image.npy", b"no array")
        archive.writestr("label.npy", b"no array")
    with pytest.raises(UserError, match=r"cannot be read: .*magic"):
        loaded(tmp_path / "bad.npz")
    with zipfile.ZipFile(saved(tmp_path, **GOOD)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as archive:
        archive.writestr("image.npy", members["image.npy"][:-5])
        archive.writestr("label.npy", members["label.npy"])
    with pytest.raises(UserError, match="image is cut short"):
        loaded(tmp_path / "bad.npz")


# Batches. The labels of the real images are row numbers, and so are those of the generated ones, from FIRST on.


FIRST = 10_000


def real(n: int, side: int = 5) -> Images:
    pixels = torch.randint(1, 128, (n, 3, side, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Images(pixels, torch.arange(n))


def generated(n: int = 300) -> Extra:
    pixels = np.random.default_rng(2).integers(128, 256, (n, *SHAPE), np.uint8)
    return Extra(pixels, FIRST + np.arange(n))


def make(n: int = 45, batch_size: int = 10, augment: str = "flip-crop", **more: Any) -> Batches:
    return Batches(real(n), batch_size, augment=augment, seed=3, **{"extra": generated(), "extra_share": 0.7, **more})


def whole(batches: Batches, epoch: int = 0, start: int = 0, **more: Any) -> tuple[Tensor, Tensor]:
    parts = list(batches.epoch(epoch, start, **more))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@pytest.mark.parametrize(("share", "expected"), [(0.7, 7), (0.5, 5), (0.04, 0), (0.14, 1), (0.9, 9), (0.96, 10)])
def test_each_batch_has_its_share_to_the_image(share: float, expected: int):
    if expected in (0, 10):
        with pytest.raises(UserError, match=rf"extra_share=0\.\d+ of a batch of 10 is {expected} extra and"):
            make(extra_share=share)
        return
    batches = make(extra_share=share, augment="flip")
    assert batches.steps == 4  # of an epoch without
    for x, y in batches.epoch(0):
        assert (y >= FIRST).tolist() == [False] * (10 - expected) + [True] * expected
        assert (x.amax((1, 2, 3)) >= 128 / 255).tolist() == (y >= FIRST).tolist()
        assert y.dtype == torch.int64
        assert x.dtype == torch.float32
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_images_and_labels_belong_together():
    extra, images = generated(), real(45)
    x, y = whole(make(augment="none"))
    for image, label in zip(x, y.tolist(), strict=True):
        source = torch.from_numpy(extra.pixels[label - FIRST]) if label >= FIRST else images.pixels[label]
        assert torch.equal(image, source / 255)


def test_extra_images_go_with_float_images():
    floats = Images(real(45).floats(), real(45).labels)
    same = Batches(floats, 10, augment="flip-crop", seed=3, extra=generated(), extra_share=0.7)
    for (x, y), (same_x, same_y) in zip(make().epoch(0), same.epoch(0), strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)


def test_own_images_at_most_once_an_epoch_and_all_in_time():
    batches = make()
    seen = [[label for label in whole(batches, epoch)[1].tolist() if label < FIRST] for epoch in range(40)]
    assert all(len(set(rows)) == len(rows) == 12 for rows in seen)
    assert {label for rows in seen for label in rows} == set(range(45))


def test_extra_images_are_drawn_evenly_with_replacement():
    batches = make(n=4000, batch_size=100, augment="none")
    _, y = whole(batches)
    counts = (y[y >= FIRST] - FIRST).bincount(minlength=300).double()
    assert counts.sum() == 2800
    assert counts.max() > 14
    assert (counts > 0).all()
    chi_squared = ((counts - 2800 / 300) ** 2 / (2800 / 300)).sum()
    assert 200 < chi_squared < 420  # of 299 degrees of freedom


def test_resuming_at_a_batch_gives_the_tail_to_the_bit():
    x, y = whole(make(), epoch=2)
    for start in range(5):
        if start == 4:
            assert not list(make().epoch(2, start))
            continue
        x_tail, y_tail = whole(make(), 2, start)
        assert torch.equal(x_tail, x[10 * start :])
        assert torch.equal(y_tail, y[10 * start :])


def test_a_second_view_has_the_same_rows_in_other_cuts():
    x, y = whole(make())
    x2, y2 = whole(make(), view=1)
    assert torch.equal(y, y2)
    differ = (x != x2).flatten(1).any(1)
    assert differ[y < FIRST].any()
    assert differ[y >= FIRST].any()
    assert torch.equal(whole(make(augment="none"))[0], whole(make(augment="none"), view=1)[0])


def test_epochs_and_seeds_draw_other_extra_images():
    drawn = {tuple(whole(make(), epoch)[1].tolist()) for epoch in range(4)}
    assert len(drawn) == 4


def test_ranks_share_both_kinds_as_equally_as_can_be():
    _, y = whole(make(batch_size=20, extra_share=0.6))
    shares = [whole(make(batch_size=20, extra_share=0.6, rank=rank, world=4)) for rank in range(4)]
    assert all(len(y_mine) == len(y) // 4 for _, y_mine in shares)
    for step in range(2):
        mine = [(a[5 * step : 5 * step + 5], b[5 * step : 5 * step + 5]) for a, b in shares]
        assert all((b >= FIRST).sum() == 3 for _, b in mine)
        assert sorted(torch.cat([b for _, b in mine]).tolist()) == sorted(y[20 * step : 20 * step + 20].tolist())
    no_cut = [whole(make(batch_size=20, extra_share=0.6, augment="none", rank=r, world=4)) for r in range(4)]
    assert all(
        torch.equal((x >= 128 / 255).any((1, 2, 3)), labels >= FIRST)
        for (x, _), (_, labels) in zip(no_cut, shares, strict=True)
    )
    unequal = [next(make(batch_size=20, extra_share=0.7, rank=r, world=4).epoch(0))[1] for r in range(4)]
    assert [int((labels >= FIRST).sum()) for labels in unequal] == [3, 4, 3, 4]  # 14 of 20
    assert [int((labels < FIRST).sum()) for labels in unequal] == [1, 2, 1, 2]
    with pytest.raises(UserError, match="a batch of 8 images leaves none to some of 8 processes"):
        make(batch_size=8, extra_share=0.25, world=8)


def test_without_extra_data_nothing_changes():
    plain = Batches(real(45), 10, augment="flip-crop", seed=3)
    given = make(extra=None, extra_share=0.3)
    assert all(torch.equal(a, b) for a, b in zip(whole(plain), whole(given), strict=True))
    assert len(whole(given)[1].unique()) == 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_any_device_gives_the_same_bits():
    there = Batches(real(45).to("cuda"), 10, augment="flip-crop", seed=3, extra=generated(), extra_share=0.7)
    x, y = whole(there)
    assert x.is_cuda
    assert torch.equal(x.cpu(), whole(make())[0])
    assert torch.equal(y.cpu(), whole(make())[1])


def test_digests_are_those_of_the_same_images_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extra_file, "_ROWS", 7)
    digests = loaded(saved(tmp_path, image=COLOUR.transpose(0, 2, 3, 1), label=LABELS)).digests
    assert np.array_equal(digests, Images(torch.from_numpy(COLOUR), torch.from_numpy(LABELS)).digests)
