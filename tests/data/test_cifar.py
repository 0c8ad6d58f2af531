"""CIFAR: the real files where they are at hand, small made-up releases for everything that can go wrong."""

from __future__ import annotations

import io
import os
import tarfile
from dataclasses import replace
from functools import partial
from hashlib import md5
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from advalign.data import cifar, load
from advalign.errors import UserError

REAL = Path(os.environ.get("ADVALIGN_DATA") or Path(__file__).parents[2] / ".data")


@pytest.fixture(autouse=True)
def nothing_of_this_computer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ADVALIGN_DATA", raising=False)
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path / "cache"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "first_label", "mean", "deviation"),
    [
        ("cifar10", 10, "frog", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ("cifar100", 100, "cattle", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    ],
)
def test_real_data(name: str, classes: int, first_label: str, mean: tuple[float, ...], deviation: tuple[float, ...]):
    if not (REAL / cifar.RELEASES[name].folder).is_dir():
        pytest.skip(f"{name} is neither in ADVALIGN_DATA nor in .data of the repository")
    data = load(name, directory=REAL)
    assert data.shape == (3, 32, 32)
    assert data.classes == classes
    assert data.train.labels.bincount().tolist() == [50_000 // classes] * classes
    assert data.test.labels.bincount().tolist() == [10_000 // classes] * classes
    assert data.class_names[data.train.labels[0]] == first_label
    # Exact sums over the histogram of each channel: no 600 MB of floats.
    levels = torch.arange(256, dtype=torch.float64) / 255
    for channel in range(3):
        share = data.train.pixels[:, channel].flatten().bincount(minlength=256).double() / (50_000 * 1024)
        average = float((share * levels).sum())
        assert average == pytest.approx(mean[channel], abs=6e-5)
        assert float((share * (levels - average) ** 2).sum()) ** 0.5 == pytest.approx(deviation[channel], abs=6e-5)


def records(n: int, labels: int, seed: int) -> bytes:
    draw = np.random.default_rng(seed)
    head = draw.integers(0, 3, (n, labels), np.uint8)
    return np.hstack([head, draw.integers(0, 256, (n, 3072), np.uint8)]).tobytes()


@pytest.fixture(params=["cifar10", "cifar100"])
def made_up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[str, Path]:
    """A release of a few images with its own checksums, and the folder above it."""
    name, release = request.param, cifar.RELEASES[request.param]
    root = tmp_path / "given"
    (root / release.folder).mkdir(parents=True)
    sums = {}
    for seed, file in enumerate([*release.train, *release.test]):
        content = records(4, release.labels, seed)
        (root / release.folder / file).write_bytes(content)
        sums[file] = md5(content).hexdigest()
    (root / release.folder / release.names).write_text("ape\nbee\ncat\n\n")  # the official file ends with an empty line
    own = {part: {file: sums[file] for file in getattr(release, part)} for part in ("train", "test")}
    monkeypatch.setitem(cifar.RELEASES, name, replace(release, **own))
    return name, root


def test_records_are_read_as_documented(made_up: tuple[str, Path]):
    name, root = made_up
    release = cifar.RELEASES[name]
    data = load(name, directory=root)
    width = release.labels + 3072
    row = 0
    for file in release.train:
        content = (root / release.folder / file).read_bytes()
        for record in (content[start : start + width] for start in range(0, len(content), width)):
            assert data.train.labels[row] == record[release.labels - 1]
            red_green_blue = [list(record[release.labels :][1024 * c : 1024 * c + 1024]) for c in range(3)]
            assert data.train.pixels[row].flatten(1).tolist() == red_green_blue
            row += 1
    assert len(data.train) == row
    assert data.class_names == ("ape", "bee", "cat")


def test_the_folder_itself_or_the_environment_will_do(made_up: tuple[str, Path], monkeypatch: pytest.MonkeyPatch):
    name, root = made_up
    expected = load(name, directory=root).digest
    assert load(name, directory=str(root / cifar.RELEASES[name].folder)).digest == expected
    monkeypatch.setenv("ADVALIGN_DATA", str(root))
    assert load(name).digest == expected


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"\x01\x02" + content[2:]])
def test_a_damaged_file_is_refused_by_name(made_up: tuple[str, Path], damage):
    name, root = made_up
    file = root / cifar.RELEASES[name].folder / next(iter(cifar.RELEASES[name].test))
    content = damage(b"\x00\x00" + file.read_bytes()[2:])
    file.write_bytes(content)
    with pytest.raises(UserError, match=rf"{file.name} is corrupt or cut short: {len(content)} bytes with MD5"):
        load(name, directory=root)


@pytest.mark.parametrize("variable", [False, True])
def test_a_given_folder_without_the_data_is_refused_not_filled(
    made_up: tuple[str, Path], variable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    name, root = made_up
    release = cifar.RELEASES[name]
    file = next(iter(release.train))
    (root / release.folder / file).unlink()
    monkeypatch.setenv("ADVALIGN_DATA", str(root) if variable else "")
    with pytest.raises(UserError, match=rf"{name} is not in .*{release.folder}.*did not find {file};"):
        load(name, directory=None if variable else root)
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def served(made_up: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The made-up release as an archive on a web server of our own."""
    name, root = made_up
    release = cifar.RELEASES[name]
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.add(root / release.folder, release.folder)
    (tmp_path / "release.tar.gz").write_bytes(buffer.getvalue())

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(tmp_path))) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/release.tar.gz"
        sum_of_archive = md5(buffer.getvalue()).hexdigest()
        monkeypatch.setitem(cifar.RELEASES, name, replace(release, url=url, md5=sum_of_archive))
        yield name, load(name, directory=root).digest
        server.shutdown()
        thread.join()


def test_download_and_repair(served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name, digest = served
    assert load(name).digest == digest
    release = cifar.RELEASES[name]
    (tmp_path / "cache" / release.folder / next(iter(release.train))).unlink()
    assert load(name).digest == digest  # unpacked again
    monkeypatch.setitem(cifar.RELEASES, name, replace(release, url="http://127.0.0.1:9/never.tar.gz"))
    assert load(name).digest == digest  # not fetched again


def test_a_download_with_a_wrong_checksum_is_refused(served: tuple[str, str], monkeypatch: pytest.MonkeyPatch):
    name, _ = served
    monkeypatch.setitem(cifar.RELEASES, name, replace(cifar.RELEASES[name], md5="0" * 32))
    with pytest.raises(UserError, match=r"could not be downloaded: .* by hand, .*--data-dir"):
        load(name)


@pytest.mark.parametrize("name", cifar.RELEASES)
def test_without_network_the_message_says_how_to_download_by_hand(name: str, monkeypatch: pytest.MonkeyPatch):
    url = "http://127.0.0.1:9/release.tar.gz"  # the discard port: nobody answers
    monkeypatch.setitem(cifar.RELEASES, name, replace(cifar.RELEASES[name], url=url))
    with pytest.raises(UserError, match=rf"{name} could not be downloaded: fetch {url} by hand.*--data-dir") as caught:
        load(name)
    assert "\n" not in str(caught.value)
