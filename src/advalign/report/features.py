"""t-SNE of a network's clean and adversarial features: computed once, kept in a file, drawn side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from advalign import attacks, models
from advalign.data import Images
from advalign.runs import load
from advalign.runs.files import write_atomically
from advalign.runtime import seeded
from advalign.threats import Threat

_BATCH = 500


class FeatureMap(NamedTuple):
    """Places in the plane of the features of N images and of their adversarial examples."""

    clean: NDArray[np.float32]  # (N, 2)
    adversarial: NDArray[np.float32]  # (N, 2)
    labels: NDArray[np.int64]  # (N,)


def few(images: Images, *, classes: int, each: int) -> Images:
    """Return the first images of the first classes; fewer of a class that has fewer."""
    rows = [(images.labels == label).nonzero()[:each, 0] for label in range(classes)]
    return images.take(torch.cat(rows))


def feature_map(run: Path, images: Images, threat: Threat, device: torch.device, kept: Path) -> FeatureMap:
    """Return the map of a run's best network, from the file if it was made before; adversarial images by PGD-20.

    Features are what the last linear layer reads. Van der Maaten and Hinton 2008, perplexity 30, begun at the principal
    components; clean and adversarial ones in one map.
    """
    if not kept.exists():
        content = io.BytesIO()
        np.savez(content, **_embedded(run, images, threat, device)._asdict())
        write_atomically(kept, content.getvalue())
    with np.load(kept) as file:
        return FeatureMap(**file)


def feature_maps(maps: Mapping[str, FeatureMap]) -> Figure:
    """Draw maps side by side, clean features above adversarial ones, a colour a class."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.6 * len(maps) + 0.4, 5.2), layout="constrained")
        grid = figure.subplots(2, len(maps), squeeze=False, sharex="col", sharey="col")
        for column, (name, found) in enumerate(maps.items()):
            for axes, places in zip(grid[:, column], (found.clean, found.adversarial), strict=True):
                axes.scatter(*places.T, c=found.labels, cmap="tab10", vmin=0, vmax=9, s=2, linewidths=0)
                axes.set(xticks=[], yticks=[])
            grid[0][column].set_title(name)
        grid[0][0].set_ylabel("clean")
        grid[1][0].set_ylabel("adversarial")
    return figure


def _embedded(run: Path, images: Images, threat: Threat, device: torch.device) -> FeatureMap:
    from sklearn.manifold import TSNE

    net = load(run).to(device)
    tapped, attack = models.Tapped(net, ("penultimate",), frozen=True), attacks.PGD(threat, steps=20)
    clean, adversarial = [], []
    images = images.to(device)
    for rows in torch.arange(len(images), device=device).split(_BATCH):
        x = images.floats(rows)
        with seeded("features", int(rows[0])):
            x_adv = attack(net, x, images.labels[rows])
        clean.append(tapped(x).features["penultimate"].cpu())
        adversarial.append(tapped(x_adv).features["penultimate"].cpu())
    features = torch.cat([*clean, *adversarial]).numpy()
    places = TSNE(perplexity=min(30, len(images) / 2), init="pca", random_state=0).fit_transform(features)
    clean_places, adversarial_places = np.split(places, 2)
    return FeatureMap(clean_places, adversarial_places, images.labels.cpu().numpy())
