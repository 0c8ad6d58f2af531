"""Images that are read from a file or from the machine's memory: the same to the bit as images that are held."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.data.folders import write_photos
from torch import Tensor

import advalign as aa
from advalign.data import (
    Batches,
    Images,
    cache,
    describe,
    hold_out,
    image_cache,
    images,
    load,
    stored,
    stratified_subset,
)
from advalign.data.cache import Rows, cached_array
from advalign.data.stored import StoredImages, joined, on_device
from advalign.errors import UserError
from advalign.evaluation.accuracy import evaluate
from advalign.runtime import memory


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fits, neither in the machine's memory nor on a device."""
    for module in (image_cache, stored):
        monkeypatch.setattr(module, "free_memory", lambda device: 0)


@pytest.fixture
def both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[aa.data.Dataset, aa.data.Dataset]:
    """One folder, in memory and read from its file."""
    held = load(f"folder:{write_photos(tmp_path / 'photos', each=12)}", image_size=12)
    with monkeypatch.context() as patch:
        patch.setattr(image_cache, "free_memory", lambda device: 0)
        read = load(held.name, image_size=12)
    assert not isinstance(held.train, StoredImages)
    assert isinstance(read.train, StoredImages)
    return held, read


def same(a: Images, b: Images) -> bool:
    return torch.equal(a.pixels, b.pixels) and torch.equal(a.labels, b.labels) and list(a.digests) == list(b.digests)


def test_all_that_is_done_with_a_data_set_gives_the_same(both: tuple[aa.data.Dataset, aa.data.Dataset]):
    held, read = both
    for split in ("train", "test"):
        assert same(getattr(held, split), getattr(read, split))
    assert (read.digest, read.training_digest, read.shape) == (held.digest, held.training_digest, held.shape)
    assert describe(read) == describe(held)
    for a, b in zip(hold_out(held.train, 9, 0), hold_out(read.train, 9, 0), strict=True):
        assert isinstance(b, StoredImages)
        assert same(a, b)
    drawn = stratified_subset(read.train, 7, 3)
    assert same(stratified_subset(held.train, 7, 3), drawn)
    assert torch.equal(drawn.floats(torch.tensor([5, 0])), drawn.floats()[[5, 0]])
    together = joined([read.test, drawn])
    assert isinstance(together, StoredImages)
    assert same(joined([held.test, stratified_subset(held.train, 7, 3)]), together)
    assert same(joined([held.test, drawn]), together)
    assert repr(read.test).startswith(f"StoredImages({tuple(held.test.shape)}, read from /")


@pytest.mark.parametrize("augment", ["flip-crop", "resized-crop", "autoaugment-first"])
def test_batches_are_the_same_to_the_bit(augment: str, both: tuple[aa.data.Dataset, aa.data.Dataset]):
    """Also from the middle of an epoch on, in a further view, in an order of one's own, and of one rank of two."""

    def batches(images: Images, **more) -> list[tuple[Tensor, Tensor]]:
        order = images.labels.argsort(stable=True)
        made = Batches(images, 8, augment=augment, seed=5, order=order, **more)
        return [*made.epoch(1), *made.epoch(2, start=1, view=1)]

    held, read = (data.train for data in both)
    for more in ({}, {"rank": 1, "world": 2}):
        expected, given = batches(held, **more), batches(read, **more)
        assert len(expected) == len(given) > 2
        for (x, y), (x_read, y_read) in zip(expected, given, strict=True):
            assert torch.equal(x, x_read)
            assert torch.equal(y, y_read)


def test_training_and_evaluation_are_the_same_to_the_bit_also_when_resumed(
    tmp_path: Path, both: tuple[aa.data.Dataset, aa.data.Dataset], monkeypatch: pytest.MonkeyPatch, no_memory: None
):
    recipe = aa.Recipe(epochs=2, steps=1, batch_size=8, validation=4, validate_every=2, awp=0.01, awp_start=1)
    weights, outcomes = [], []
    for data, stopped in zip(both, (False, True), strict=True):
        runs = tmp_path / str(stopped)
        train = {"data": data, "model": "small-cnn(width=2)", "recipe": recipe, "runs": runs}
        if stopped:
            run = aa.train("at", **train, time_budget=1e-9)
            assert not run.finished
        run = aa.train("at", **train)
        assert run.finished
        weights.append(run.weights("last").read_bytes())
        net = aa.load(run.weights("last"))
        outcomes.append(evaluate(net, on_device(data.test, torch.device("cpu")), aa.attacks.FGSM(aa.Linf(0.1))).correct)
    assert weights[0] == weights[1]
    for name, flags in outcomes[0].items():
        assert torch.equal(flags, outcomes[1][name])


def test_what_fits_is_held_and_what_does_not_is_read(both: tuple, monkeypatch: pytest.MonkeyPatch, caplog):
    held, read = (data.test for data in both)
    cpu, size = torch.device("cpu"), held.size
    monkeypatch.setattr(stored, "free_memory", lambda device: 2 * size)
    assert not isinstance(on_device(read, cpu), StoredImages)
    assert same(on_device(read, cpu), held)
    monkeypatch.setattr(stored, "free_memory", lambda device: 2 * size - 1)
    assert isinstance(on_device(read, cpu), StoredImages)
    assert on_device(held, cpu) is held
    monkeypatch.setattr(stored, "free_memory", lambda device: 4 * size - 1)
    with monkeypatch.context() as patch:
        patch.setattr(stored.ranks, "on_this_machine", lambda: 2)
        assert isinstance(on_device(read, cpu), StoredImages)
        assert on_device(read, torch.device("meta")).read().is_meta
    monkeypatch.setattr(stored, "free_memory", lambda device: 2 * size - 1)
    elsewhere = on_device(held, torch.device("meta"))
    assert isinstance(elsewhere, StoredImages)
    assert elsewhere.source is held
    assert elsewhere.read(slice(0, 2)).device.type == "meta"
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith(f"note: {len(read)} images take 0 MiB, more than half of the 0 MiB that are free on cpu")
    assert [line.partition("read from ")[2] for line in lines] == [
        "the file, a batch ahead", "the file, a batch ahead", "this machine's memory, a batch ahead",
    ]  # fmt: skip


def test_images_that_fit_on_a_device_are_brought_to_it_part_by_part(both: tuple, monkeypatch: pytest.MonkeyPatch):
    """As those of a file may be more than this machine's memory."""
    held, read = (data.test for data in both)
    monkeypatch.setattr(images, "_PART", 2 * held.size // len(held))
    asked: list[int] = []
    read_rows = stored.ImageFile.read
    monkeypatch.setattr(
        stored.ImageFile, "read", lambda self, rows: (asked.append(len(rows)), read_rows(self, rows))[1]
    )
    assert same(on_device(read, torch.device("cpu")), held)
    assert len(asked) > 1
    assert max(asked) == 2


def test_no_room_above_the_data_reads_all_pixels_at_once():
    """`pixels` of stored images reads all of them: other rooms ask for rows; floats in memory are checked whole."""
    source = Path(aa.__file__).parent
    readers = {
        path.relative_to(source).as_posix(): len(re.findall(r"\.pixels\b", path.read_text()))
        for path in source.rglob("*.py")
        if path.parent != source / "data"
    }
    assert {path: count for path, count in readers.items() if count} == {"evaluation/accuracy.py": 1}


def test_images_in_memory_are_read_as_they_are():
    pixels = torch.rand(9, 3, 4, 4)
    held = Images(pixels, torch.arange(9))
    read = StoredImages(held, held.labels)
    assert same(held.take([4, 1]), read.take([4, 1]))
    assert [x.tolist() for x, _ in Batches(read, 4, augment="flip", seed=0).epoch(0)] == [
        x.tolist() for x, _ in Batches(held, 4, augment="flip", seed=0).epoch(0)
    ]


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path, no_memory: None):
    read = load(f"folder-test:{write_photos(tmp_path / 'photos', each=6)}", image_size=12).test
    assert isinstance(read, StoredImages)
    assert isinstance(read.source, stored.ImageFile)
    file = read.source.path
    whole = file.read_bytes()
    file.write_bytes(whole[: read.source.begins + 5] + b"\0" * 9 + whole[read.source.begins + 14 :])
    with pytest.raises(UserError, match=rf"{file.name} is damaged at image 0: remove it, and it is made anew"):
        list(Batches(read, 8, augment="none", seed=0).epoch(0))
    file.write_bytes(whole[:-2000])
    with pytest.raises(UserError, match=r"cannot be read: it is cut short"):
        read.floats()
    file.unlink()
    with pytest.raises(UserError, match=r"cannot be read: No such file"):
        read.floats()


def test_a_cache_is_checked_before_digests_are_made_from_it(tmp_path: Path, own_cache: Path, no_memory: None):
    """A file that was mapped, and damaged, while it fitted; and one of which only the digests are lost."""
    name = f"folder-test:{write_photos(tmp_path / 'photos', each=6)}"
    expected = load(name, image_size=12).test
    (file,), (table,) = own_cache.glob("folder-*.npy"), own_cache.glob("digests-*.npy")
    sealed, digests = file.read_bytes(), table.read_bytes()
    file.write_bytes(sealed[:500] + bytes(200) + sealed[700:])
    table.unlink()
    assert same(load(name, image_size=12).test, expected)
    assert (file.read_bytes(), table.read_bytes()) == (sealed, digests)
    table.write_bytes(digests[:-1] + b"?")
    inode = file.stat().st_ino
    assert same(load(name, image_size=12).test, expected)
    assert file.stat().st_ino == inode


def rows(
    made: list[int], stop: int | None = None, total: int = 300, error: type[BaseException] = KeyboardInterrupt
) -> Rows[int]:
    """Rows of 8 bytes, of which making one may end the program."""

    def make(row: int) -> bytes:
        if row == stop:
            raise error
        made.append(row)
        return row.to_bytes(8, sys.byteorder)

    return Rows("counting", (total,), np.uint64, lambda first: range(first, total), make)


def test_an_interrupted_cache_is_gone_on_with(own_cache: Path):
    """After Ctrl-C, and after a kill, of which rows are left that the disk is not known to have."""
    made: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        cached_array("a.npy", rows(made, stop=200))
    assert not (own_cache / "a.npy").exists()
    part = own_cache / ".a.npy.part"
    part.write_bytes(part.read_bytes() + b"\0" * 30)
    made.clear()
    assert cached_array("a.npy", rows(made)).tolist() == list(range(300))
    assert 0 < min(made) <= 200
    assert sorted(own_cache.iterdir()) == [own_cache / "a.npy"]
    cached_array("b.npy", rows(made))
    assert len({(own_cache / f"{name}.npy").read_bytes().replace(b'"b.npy"', b'"a.npy"')[:2000] for name in "ab"}) == 1
    made.clear()
    cached_array("a.npy", rows(made))
    assert not made


def test_what_a_full_disk_has_of_a_cache_is_gone_on_with(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cache, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # which takes most of the time
    made: list[int] = []
    with pytest.raises(UserError, match=r"a\.npy cannot be used: free space"):
        cached_array("a.npy", rows(made, stop=100, error=OSError))
    assert (own_cache / ".a.npy.rows").read_text() == "64"  # rows are made by 64
    monkeypatch.undo()
    monkeypatch.setenv("ADVALIGN_CACHE", str(own_cache))
    made.clear()
    assert cached_array("a.npy", rows(made)).tolist() == list(range(300))
    assert min(made) == 64
    with pytest.raises(UserError):  # such as an image that cannot be read: nothing is left
        cached_array("b.npy", rows([], stop=100, error=UserError))
    assert sorted(own_cache.iterdir()) == [own_cache / "a.npy"]


def test_a_cache_that_the_disk_cannot_hold_is_not_begun(own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    """What is there of it already counts."""
    with pytest.raises(KeyboardInterrupt):
        cached_array("a.npy", rows([], stop=100))
    missing = 128 + 300 * 8 - (own_cache / ".a.npy.part").stat().st_size
    monkeypatch.setattr(cache, "disk_usage", lambda file: SimpleNamespace(free=missing - 1))
    made: list[int] = []
    for name in ("a.npy", "b.npy"):
        with pytest.raises(UserError, match=rf"{name} cannot be used: free space, .* takes 0 MiB more, and 0 MiB are"):
            cached_array(name, rows(made))
    assert not made
    assert sorted(file.name for file in own_cache.iterdir()) == [".a.npy.part", ".a.npy.rows"]
    monkeypatch.setattr(cache, "disk_usage", lambda file: SimpleNamespace(free=missing))
    assert cached_array("a.npy", rows(made)).tolist() == list(range(300))


def test_what_was_begun_for_another_array_is_begun_anew(own_cache: Path):
    with pytest.raises(KeyboardInterrupt):
        cached_array("a.npy", rows([], stop=200))
    assert cached_array("a.npy", rows([], total=100)).tolist() == list(range(100))


def test_free_memory_is_told_within_the_limits_of_the_process():
    cpu = torch.device("cpu")
    assert 0 < memory.free_memory(cpu) < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory.require_memory(1, cpu, "a byte", "take none")
    with pytest.raises(
        UserError, match=r"^all takes \d+\.0 GiB of memory, and \d+\.\d GiB are free on cpu: take less$"
    ):
        memory.require_memory(2**60, cpu, "all", "take less")


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_limit_of_all_groups_around_the_process_counts(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A limit on a group between the root and the process's own, as schedulers and service managers set it."""
    names = [("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")][version == 1]
    root = tmp_path / "memory" if version == 1 else tmp_path
    for group, limit in {"": 900, "job": 500, "job/step": 800, "job/step/task": 700}.items():
        (root / group).mkdir(exist_ok=True)
        for name, value in zip(names, (limit, 100), strict=True):
            (root / group / name).write_text(f"{value}\n")
        (root / group / "memory.stat").write_text("inactive_file 30\ntotal_inactive_file 30\n")
    own = tmp_path / "own"
    monkeypatch.setattr(memory, "_OWN_GROUPS", own)
    monkeypatch.setattr(memory, "_LIMITS", tmp_path)
    own.write_text("1:memory:/job/step/task\n" if version == 1 else "0::/job/step/task\n")
    assert memory.free_memory(torch.device("cpu")) == 500 - 100 + 30
    own.write_text("1:memory:/\n" if version == 1 else "0::/\n")
    assert memory.free_memory(torch.device("cpu")) == 900 - 100 + 30


BEYOND_MEMORY = """
import resource, sys
import torch
import advalign as aa
from advalign.runtime.memory import free_memory
root, size, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
recipe, model = aa.Recipe(epochs=1, steps=1, batch_size=16, validation=8), "tests.networks:tiny_convnext"
warm = aa.train("at", data="digits", model=model, recipe=aa.Recipe(epochs=1, steps=1, subset=8), runs=f"{root}/warm")
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
if limit:
    resource.setrlimit(resource.RLIMIT_AS, (taken + limit, taken + limit))
data = aa.data.load(f"folder:{root}/photos", image_size=size)
print(sum(part.size for part in (data.train, data.test)), type(data.train).__name__)
run = aa.train("natural", data=data, model=model, recipe=recipe, runs=f"{root}/{limit}")
import hashlib
print(hashlib.sha256(run.weights("last").read_bytes()).hexdigest())
attack = aa.attacks.FGSM(aa.Linf(0.01))
net = aa.load(run.weights("last"), trust_model=True)
print(aa.evaluate(net, data.test.take(list(range(64))), attack, batch_size=16))
"""


@pytest.mark.slow
def test_data_beyond_a_limit_of_memory_are_trained_and_measured(tmp_path: Path):
    """354 MB of images within 315 MB of address space, with the weights that come out without a limit."""
    write_photos(tmp_path / "photos", each=600)
    ended = []
    for limit in (300 << 20, 0):
        command = [sys.executable, "-c", BEYOND_MEMORY, str(tmp_path), "256", str(limit)]
        one_heap = {**os.environ, "MALLOC_ARENA_MAX": "1"}  # else each thread takes 64 MB of address space
        ended.append(subprocess.run(command, capture_output=True, text=True, check=False, env=one_heap))
        assert not ended[-1].returncode, ended[-1].stderr
    limited, free = (each.stdout.splitlines() for each in ended)
    assert limited[0].split() == [str(1800 * 3 * 256 * 256), "StoredImages"]
    assert free[0].split()[1] == "Images"
    assert limited[1:] == free[1:]
    assert "read from the file, a batch ahead" in ended[0].stderr


@pytest.mark.slow
def test_kill_9_while_images_are_decoded(tmp_path: Path, own_cache: Path):
    root = write_photos(tmp_path / "photos", each=400)
    program = (
        "import sys; from advalign.data import cache, load; cache._SAVE_SECONDS = 0.05;"
        "load(f'folder-test:{sys.argv[1]}', image_size=256)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(root)])
    while not list(own_cache.glob(".folder-*.rows")):
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    (mark,) = own_cache.glob(".folder-*.rows")
    done = int(mark.read_text())
    assert 0 < done < 1200
    resumed = load(f"folder-test:{root}", image_size=256).digest
    (file,) = own_cache.glob("folder-*.npy")
    assert not list(own_cache.glob(".folder-*.[pr]*"))
    file.unlink()
    assert load(f"folder-test:{root}", image_size=256).digest == resumed
