"""Maps of features: whose, of which images, of which layer, and what the page says of them or in their place."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tests.samples import RECORD
from torch import nn

from advalign.cli import commands as cli
from advalign.data import load
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.report.features import FeatureMap, feature_caption, feature_map, feature_maps, first_of_each_class
from advalign.report.maps import feature_sections, mappable_runs
from advalign.report.sources import ReportSources, find_sources
from advalign.runs import Run, append_records, find_weights
from advalign.runs import load as load_net
from advalign.runs.checkpoint import load_weights
from advalign.runtime.sealed import Owner, seal_safetensors
from advalign.threats import Linf
from advalign.training.recipes import digits
from advalign.training.train import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one that is trained and measured."""
    runs = tmp_path_factory.mktemp("runs")
    recipe = replace(digits(), epochs=3, steps=1, batch_size=64)
    run = train("natural", data="digits", model="small-cnn(width=8)", recipe=recipe, runs=runs, device="cpu")
    measure(run.path, ["fgsm"], TargetOptions(eps=0.2, device="cpu"))
    return runs


class FirstTwo:
    """In place of t-SNE: the first two features, and what was given."""

    def __init__(self, **given: object) -> None:
        self.given = given

    def fit_transform(self, features: np.ndarray) -> np.ndarray:
        FirstTwo.seen, FirstTwo.setting = features, self.given
        return features[:, :2]


@pytest.mark.slow
def test_mapped_is_what_the_last_layer_reads_of_clean_images_and_of_attacked_ones(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("sklearn.manifold.TSNE", FirstTwo)
    (folder,), images = trained.iterdir(), first_of_each_class(load("digits").test, 5, 50)
    found = feature_map(find_weights(folder), images, Linf(0.2), CPU, tmp_path / "kept.npz")
    assert images.labels.bincount().tolist() == [
        min(50, int((load("digits").test.labels == k).sum())) for k in range(5)
    ]
    clean, adversarial = np.split(FirstTwo.seen, 2)
    np.testing.assert_array_equal(found.clean, clean[:, :2])
    np.testing.assert_array_equal(found.labels, images.labels)
    net = load_net(folder)
    last = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1]
    with torch.no_grad():
        torch.testing.assert_close(last(torch.from_numpy(clean)), net(images.floats()))
        logits, attacked = (last(torch.from_numpy(features)) for features in (clean, adversarial))
    assert (logits.argmax(1) == images.labels).double().mean() > 0.5
    assert (attacked.argmax(1) == images.labels).double().mean() < 0.1
    # An attack that stops at the first wrong answer leaves it a hair's breadth ahead; a whole one goes far beyond.
    assert (attacked.amax(1) - attacked.gather(1, images.labels[:, None])[:, 0]).median() > 1
    caption = feature_caption(images, Linf(0.2), load("digits").class_names[:5])
    assert f"for {len(images)} test images" in caption
    assert f"perplexity {FirstTwo.setting['perplexity']:g}, seed {FirstTwo.setting['random_state']}" in caption


def test_a_class_is_drawn_where_its_features_lie():
    points = np.arange(12, dtype=np.float32).reshape(6, 2)
    drawn = feature_maps({"at": FeatureMap(points, -points, np.array([0, 1, 0, 1, 1, 1]))}, ("cat", "dog"))
    for axes, sign in zip(drawn.axes, (1, -1), strict=True):
        shown = {each.get_label(): np.asarray(each.get_offsets()) for each in axes.collections}
        np.testing.assert_array_equal(shown["cat"], sign * points[[0, 2]])
        np.testing.assert_array_equal(shown["dog"], sign * points[[1, 3, 4, 5]])


def sections_of(found: ReportSources, kept: Path, missing: list[str], most: int = 4, data_dir: Path | None = None):
    return feature_sections(
        found, kept, most=most, data_dir=data_dir, trust_model=False, missing=missing, console=Console(quiet=True)
    )


@pytest.mark.slow
def test_a_map_is_made_once_and_again_when_the_weights_have_changed(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "runs")
    missing: list[str] = []
    (section,) = sections_of(find_sources([tmp_path / "runs"]), tmp_path / "kept", missing)
    assert section.heading == "Features: digits, Linf(0.2)"
    assert section.caption.endswith("1 of 1 models whose weights are there.")
    (kept,) = (tmp_path / "kept").iterdir()
    stamp = kept.stat().st_mtime_ns
    sections_of(find_sources([tmp_path / "runs"]), tmp_path / "kept", missing)
    assert kept.stat().st_mtime_ns == stamp
    (run,) = (tmp_path / "runs").iterdir()
    state, card = load_weights(run / "best.safetensors")
    state["fc.bias"] += 1
    changed = seal_safetensors(state, {"card": json.dumps(card)}, Owner(card["run"], ""))
    (run / "best.safetensors").write_bytes(changed)
    sections_of(find_sources([tmp_path / "runs"]), tmp_path / "kept", missing)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert missing == []


def test_what_cannot_be_mapped_is_said(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    missing: list[str] = []
    found = find_sources([trained])
    assert sections_of(found, tmp_path, missing, most=0) == []
    elsewhere = [replace(record, data="cifar10") for record in found.records]
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path))
    assert sections_of(replace(found, records=elsewhere), tmp_path, missing, data_dir=tmp_path) == []
    (run,) = found.runs.values()
    shutil.copytree(run.path, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert sections_of(find_sources([tmp_path / "bare"]), tmp_path, missing) == []
    (tmp_path / "bare" / "best.safetensors").write_bytes(b"torn")
    assert sections_of(find_sources([tmp_path / "bare"]), tmp_path, missing) == []
    for line, word in zip(missing, ("asked for", "cifar10 is not in", "holds both weights", "is damaged"), strict=True):
        assert line.startswith("Features")
        assert word in line


@pytest.mark.slow
def test_the_page_says_it(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sklearn.manifold.TSNE", FirstTwo)
    cli.main(["report", str(trained), "--out", str(tmp_path / "page.html")])
    text = (tmp_path / "page.html").read_text()
    assert "<h2>Features: digits, Linf(0.2)</h2>" in text
    for ending in ("svg", "pdf", "png"):
        assert f'href="page-files/features-digits-linf-0-2.{ending}"' in text
    cli.main(["report", str(trained), "--out", str(tmp_path / "none.html"), "--maps", "0"])
    assert "<li>Features: no maps were asked for" in (tmp_path / "none.html").read_text()


def test_natural_training_comes_first_then_the_order_of_the_paths_seed_by_seed(tmp_path: Path):
    records, runs = [], {}
    for i, (method, seed, threats) in enumerate(
        [("at", 1, 2), ("at", 0, 2), ("natural", 0, 1), ("trades", 0, 1), ("weightless", 0, 1), ("natural", 1, 1)]
    ):
        run = Run(tmp_path / str(i), {"method": method, "recipe": {"seed": seed}})
        run.path.mkdir()
        if method != "weightless":
            run.weights("best").touch()
        runs[f"{method}{seed}"] = run
        for n in (9, 500):
            spelled = [f"Linf({eps})" for eps in (0.2, 0.1)[:threats]]
            records += [replace(RECORD, method=method, run=f"{method}{seed}", n=n, threat=each) for each in spelled]
    append_records(tmp_path / "records.jsonl", records)
    groups = mappable_runs(replace(find_sources([tmp_path / "records.jsonl"]), runs=runs))
    assert groups == {("digits", "0123", "Linf(0.2)"): ["natural0", "at0", "trades0", "natural1", "at1"]}
