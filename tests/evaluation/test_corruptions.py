"""Common corruptions: published files are checked, those made here follow their definitions, and the mean is plain."""

from __future__ import annotations

import colorsys
import io
import json
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from advalign import models
from advalign.cli import commands as cli
from advalign.data import Dataset, Images
from advalign.data.corrupt import CORRUPTIONS, corrupt
from advalign.data.corruptions import TYPES, find_corruptions, read_corruptions
from advalign.data.images import stratified_split
from advalign.errors import UserError
from advalign.evaluation import corruptions as module
from advalign.evaluation.corruptions import measure_corruptions
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.target import SUBSET_SEED
from advalign.report.corruptions import corruption_line, corruption_table

N = 12
NAMES = tuple(map(str, range(10)))


def pictures(n: int = N) -> np.ndarray:
    """Smooth images (n, 32, 32, 3), uint8, each another."""
    rng, t = np.random.default_rng(0), np.linspace(0, 3, 32)
    waves = np.sin(t[:, None, None] * rng.uniform(1, 3, (n, 1, 1, 3)) + t[:, None] * rng.uniform(-3, 3, (n, 1, 1, 3)))
    return (127 + 100 * waves).astype(np.uint8)


def data(name: str = "cifar10") -> Dataset:
    test = Images(torch.from_numpy(pictures().transpose(0, 3, 1, 2).copy()), torch.arange(N) % 10)
    return Dataset(name, Images(test.pixels[:0], test.labels[:0]), test, NAMES)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two types as they are published, each severity a little darker."""
    np.save(tmp_path / "labels.npy", np.tile(np.arange(N) % 10, 5).astype(np.uint8))
    for k, kind in enumerate(("fog", "contrast")):
        np.save(tmp_path / f"{kind}.npy", np.concatenate([pictures() - np.uint8(s + 5 * k) for s in range(5)]))
    return tmp_path


def test_published_files_are_read_by_type_severity_and_row(folder: Path):
    found = find_corruptions(f"cifar10-c:{folder}", data())
    assert found.types == ("fog", "contrast")
    assert set(found.missing) == set(TYPES) - {"fog", "contrast"}
    rows = torch.tensor([1, 7, 11])
    for kind, darker in (("fog", 0), ("contrast", 5)):
        for severity in range(1, 6):
            expected = (pictures()[rows.numpy()] - np.uint8(severity - 1 + darker)).transpose(0, 3, 1, 2)
            assert np.array_equal(found.images(kind, severity, rows).numpy(), expected)


def _other_labels(folder: Path) -> None:
    np.save(folder / "labels.npy", np.zeros(5 * N, np.uint8))


def _few_rows(folder: Path) -> None:
    np.save(folder / "fog.npy", pictures())


def _floats(folder: Path) -> None:
    np.save(folder / "fog.npy", np.load(folder / "fog.npy") / 255)


def _another_order(folder: Path) -> None:
    array = np.load(folder / "fog.npy").reshape(5, N, 32, 32, 3)
    np.save(folder / "fog.npy", np.random.default_rng(1).permutation(array, axis=1).reshape(-1, 32, 32, 3) ^ 85)


def _dark_but_for_the_first(folder: Path) -> None:
    array = np.load(folder / "fog.npy")
    array[N:] = 0
    np.save(folder / "fog.npy", array)


def _partly_reversed(folder: Path) -> None:
    array = np.load(folder / "fog.npy")
    array[2 * N + 3 : 2 * N + 9] = array[2 * N + 3 : 2 * N + 9][::-1].copy()
    np.save(folder / "fog.npy", array)


def _program(folder: Path) -> None:
    np.save(folder / "fog.npy", np.array([print], dtype=object), allow_pickle=True)


def _torn(folder: Path) -> None:
    (folder / "fog.npy").write_bytes((folder / "fog.npy").read_bytes()[:999])


def _none(folder: Path) -> None:
    (folder / "fog.npy").unlink()
    (folder / "contrast.npy").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_other_labels, "labels.npy has not the labels of the 12 test images of cifar10"),
        (_few_rows, "has uint8 values of shape"),
        (_floats, "has float64 values"),
        (_another_order, "other images, or in another order"),
        (_partly_reversed, "in another order: at severity 3 only .* correlate"),
        (_dark_but_for_the_first, "fog.npy is damaged: at severity 2, 100 % of the images have a single value"),
        (_program, "cannot be read"),
        (_torn, "cannot be read"),
        (_none, "has none of the corruptions"),
        (lambda folder: (folder / "labels.npy").unlink(), "labels.npy is missing"),
    ],
)
def test_files_are_not_believed_unchecked(folder: Path, spoil: Any, words: str):
    spoil(folder)
    with pytest.raises(UserError, match=words):
        read_corruptions("cifar10-c", folder, data())


@pytest.mark.parametrize(
    ("spelling", "name", "words"),
    [
        ("cifar10-d:x", "cifar10", "unknown corruptions 'cifar10-d:x'"),
        ("cifar10-c", "cifar10", "write cifar10-c:DIR"),
        ("cifar100-c:x", "cifar10", "made of the test images of cifar100, not of cifar10"),
        ("cifar10-c:nowhere", "cifar10", "no folder 'nowhere'"),
    ],
)
def test_what_does_not_fit_is_named(spelling: str, name: str, words: str):
    with pytest.raises(UserError, match=words):
        find_corruptions(spelling, data(name))


def test_corruptions_without_chance_follow_their_definitions():
    x = pictures(1)[0]
    x[0, 0] = 0
    float_ = x / 255
    contrast = np.clip((float_ - float_.mean((0, 1))) * 0.3 + float_.mean((0, 1)), 0, 1) * 255
    assert np.abs(corrupt(x, "contrast", 4, seed=0) - contrast).max() <= 1
    for pixel in np.ndindex(32, 32):
        hue, saturation, value = colorsys.rgb_to_hsv(*float_[pixel])
        expected = 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1)))
        assert np.abs(corrupt(x, "brightness", 3, seed=0)[pixel] - expected).max() <= 1 if pixel[1] == 0 else True
    file = io.BytesIO()
    Image.fromarray(x).save(file, "JPEG", quality=58)
    assert np.array_equal(corrupt(x, "jpeg_compression", 3, seed=0), np.asarray(Image.open(file)))
    point = np.zeros((32, 32, 3), np.uint8)
    point[16, 16] = 255
    spread = corrupt(point, "defocus_blur", 4, seed=0)[:, :, 0].astype(float)  # a disk of radius 1 is a cross of five
    assert np.allclose(spread[16, 15:18], 51, atol=1)
    assert np.allclose(spread[15:18, 16], 51, atol=1)
    assert spread.sum() == pytest.approx(255, abs=5)
    flat = np.full((32, 32, 3), 77, np.uint8)
    for kind in ("zoom_blur", "defocus_blur", "pixelate", "glass_blur", "contrast"):
        assert np.abs(corrupt(flat, kind, 5, seed=0).astype(int) - 77).max() <= 1, kind


def test_corruptions_by_chance_have_their_strength_and_repeat():
    flat = np.full((32, 32, 3), 128, np.uint8)
    many = {
        kind: np.stack([corrupt(flat, kind, 5, seed=k) for k in range(20)]).astype(float) / 255
        for kind in ("gaussian_noise", "shot_noise", "impulse_noise", "fog")
    }
    assert many["gaussian_noise"].std() == pytest.approx(0.10, rel=0.03)
    assert many["shot_noise"].std() == pytest.approx((0.5 / 50) ** 0.5, rel=0.03)  # a Poisson variable over its rate
    assert ((many["impulse_noise"] == 0) | (many["impulse_noise"] == 1)).mean() == pytest.approx(0.07, rel=0.1)
    fog, v = (
        many["fog"],
        128 / 255,
    )  # from v^2 / (v + 1.5) where there is none, to v (v + 1.5) / (v + 1.5) where most is
    assert fog.min() == pytest.approx(v * v / (v + 1.5), abs=0.01)
    assert fog.max() == pytest.approx(v, abs=0.01)
    assert np.array_equal(corrupt(flat, "fog", 5, seed=3), corrupt(flat, "fog", 5, seed=3))
    assert not np.array_equal(corrupt(flat, "fog", 5, seed=3), corrupt(flat, "fog", 5, seed=4))
    x = pictures(1)[0]
    away = {
        kind: [np.abs(corrupt(x, kind, s, seed=0) - x.astype(float)).mean() for s in (1, 5)] for kind in CORRUPTIONS
    }
    assert all(weak < strong for weak, strong in away.values())


@pytest.fixture
def weights(tmp_path: Path) -> str:
    """A network and twelve images, in files."""
    torch.manual_seed(0)
    torch.save(models.build("small-cnn(width=2)", classes=10).state_dict(), tmp_path / "net.pt")
    np.savez(tmp_path / "own.npz", x_test=pictures(), y_test=np.arange(N) % 10)
    return f"small-cnn(width=2)@{tmp_path / 'net.pt'}"


def test_two_folders_share_neither_result_nor_progress(
    weights: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other"
    other.mkdir()
    np.save(other / "labels.npy", np.load(folder / "labels.npy"))
    for kind in ("fog", "contrast"):
        np.save(other / f"{kind}.npy", np.load(folder / f"{kind}.npy")[..., ::-1])
    monkeypatch.setattr(module, "find_corruptions", lambda path, data: read_corruptions("cifar10-c", Path(path), data))
    monkeypatch.setattr("advalign.evaluation.state.SAVE_SECONDS", -1.0)
    options, given, calls = TargetOptions(data=f"npz:{tmp_path / 'own.npz'}", device="cpu"), module.classified, 0

    def stops(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return given(*args)

    monkeypatch.setattr(module, "classified", stops)
    with pytest.raises(KeyboardInterrupt):
        measure_corruptions(weights, str(folder), options)
    second = measure_corruptions(weights, str(other), options)
    assert calls == 5 + 11
    first = measure_corruptions(weights, str(folder), options)
    assert calls == 5 + 11 + 7
    assert first.path != second.path
    for result, place in ((first, folder), (second, other)):
        content = json.loads(result.path.read_text())
        assert content["folder"] == place.name
        for kind, digits in content["files"].items():
            assert digits == sha256(np.load(place / f"{kind}.npy").tobytes()).hexdigest()[:16]


def test_what_is_made_here_names_what_has_made_it():
    found = find_corruptions("c-like", data())
    assert {each: found.libraries[each] for each in ("numpy", "scipy", "pillow")} == {
        each: version(each) for each in ("numpy", "scipy", "pillow")
    }
    assert not found.files


@pytest.mark.slow
def test_the_mean_is_that_of_a_plain_loop_and_a_stop_changes_nothing(
    weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = TargetOptions(data=f"npz:{tmp_path / 'own.npz'}", n=11, device="cpu")
    monkeypatch.setattr("advalign.evaluation.state.SAVE_SECONDS", -1.0)
    given, calls = module.classified, 0

    def stops(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return given(*args)

    monkeypatch.setattr(module, "classified", stops)
    with pytest.raises(KeyboardInterrupt):
        measure_corruptions(weights, "c-like", options)
    result = measure_corruptions(weights, "c-like", options)
    assert calls == 30 + 56 - 29
    net = models.build("small-cnn(width=2)", classes=10).eval()
    net.load_state_dict(torch.load(tmp_path / "net.pt"))
    chosen = stratified_split(result.target.dataset.test.labels, 11, SUBSET_SEED)[1]
    right = []
    for kind in CORRUPTIONS:
        for severity in range(1, 6):
            images = [corrupt(pictures()[k], kind, severity, seed=int(k)) for k in chosen]
            x = torch.tensor(np.stack(images).transpose(0, 3, 1, 2)) / 255
            with torch.no_grad():
                right.append(float((net(x).argmax(1) == chosen % 10).double().mean()))
    assert result.mean == pytest.approx(sum(right) / 55)
    content = json.loads(result.path.read_text())
    assert content["mean_accuracy"] == result.mean
    assert len(content["outcomes"]["fog 5"]) == 11
    assert set(content["missing"]) == {"motion_blur", "snow", "frost", "elastic_transform"}
    table = corruption_table(result)
    assert table.rows[-1][-1] == f"{100 * result.mean:.1f}"
    assert "which it is not" in table.caption
    assert "not in the mean: motion_blur, snow, frost, elastic_transform" in table.caption
    assert f"fog-5 {100 * right[list(CORRUPTIONS).index('fog') * 5 + 4]:.1f} %" in corruption_line(result)
    assert not list(tmp_path.glob("corruptions/.*.state"))


@pytest.mark.slow
def test_the_command_writes_and_refuses_what_is_of_attacks(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    words = ["evaluate", weights, "--data", f"npz:{tmp_path / 'own.npz'}", "--corruptions", "c-like", "-n", "10"]
    with pytest.raises(SystemExit):
        cli.main([*words, "--eps", "0.1"])
    assert "leave out --eps" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_console", lambda: Console(width=200))
    cli.main([*words, "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "c-like: " in printed
    assert "the mean over 55 cells; contrast-5 " in printed
    assert {each.suffix for each in (tmp_path / "out").iterdir()} == {".json", ".md", ".tex", ".html"}
