"""t-SNE of a network's clean and adversarial features: computed once, cached in a file, drawn side by side."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from advalign import attacks, models
from advalign.data import Images
from advalign.errors import UserError
from advalign.report.figures import HOVER
from advalign.runs import Weights, load
from advalign.runtime.files import read_content, write_atomically
from advalign.runtime.sealed import Owner, check_sealed, seal_zip
from advalign.runtime.seeds import seeded
from advalign.threats import Threat

_BATCH = 500
_PERPLEXITY = 30
_STEPS = 20
_MARKERS = "os^Dv"  # beside the colours, for readers who cannot distinguish these


class FeatureMap(NamedTuple):
    """Coordinates in the plane of the features of N images and of their adversarial examples."""

    clean: NDArray[np.float32]  # (N, 2)
    adversarial: NDArray[np.float32]  # (N, 2)
    labels: NDArray[np.int64]  # (N,)


def first_of_each_class(images: Images, classes: int, each: int) -> Images:
    """Return the first `each` images of the first `classes` classes, or all of a class that has fewer."""
    rows = [(images.labels == label).nonzero()[:each, 0] for label in range(classes)]
    return images.take(torch.cat(rows))


def feature_map(weights: Weights, images: Images, threat: Threat, device: torch.device, cache_file: Path) -> FeatureMap:
    """Return the map of a network, from the cache file if it exists; adversarial images are by PGD-20.

    Features are the inputs of the last linear layer. t-SNE: van der Maaten and Hinton 2008, perplexity 30, started at
    the principal components, clean and adversarial features in one map.

    Raises:
        UserError: the network cannot be built, or has no linear layer.
    """
    if (cached := _cached(cache_file)) is not None:
        return cached
    content, made = io.BytesIO(), _embedded(weights, images, threat, device)
    np.savez(content, **made._asdict())
    write_atomically(cache_file, seal_zip(content.getvalue(), _cache_owner(cache_file)))
    return made


def _cache_owner(file: Path) -> Owner:
    return Owner(file.name, "remove it")


def _cached(file: Path) -> FeatureMap | None:
    """Return the map in a cache file; None where there is none, or it is damaged or of another version."""
    try:
        content = read_content(file)
        if not check_sealed(content, file, _cache_owner(file)):
            return None
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = dict(archive)
    except UserError:
        return None
    if arrays.keys() != {*FeatureMap._fields}:
        return None
    n = len(arrays["labels"]) if arrays["labels"].ndim else 0
    expected = {"clean": (n, 2), "adversarial": (n, 2), "labels": (n,)}
    return FeatureMap(**arrays) if {name: array.shape for name, array in arrays.items()} == expected else None


def feature_maps(maps: Mapping[str, FeatureMap], class_names: Sequence[str]) -> Figure:
    """Draw maps side by side, clean features above adversarial ones, a colour and a marker for each class.

    Args:
        class_names: names of the labels in the maps, from 0 on.
    """
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.6 * len(maps) + 0.4, 5.4), layout="constrained")
        grid = figure.subplots(2, len(maps), squeeze=False, sharex="col", sharey="col")
        for column, (name, feature_map) in enumerate(maps.items()):
            size = min(10, max(2, 2500 / len(feature_map.labels)))
            for axes, points in zip(grid[:, column], (feature_map.clean, feature_map.adversarial), strict=True):
                for label, class_name in enumerate(class_names):
                    axes.scatter(
                        *points[feature_map.labels == label].T, s=size, color=f"C{label}", linewidths=0,
                        label=class_name, marker=_MARKERS[label % len(_MARKERS)], gid=HOVER + class_name,
                    )  # fmt: skip
                axes.set(xticks=[], yticks=[])
            grid[0][column].set_title(textwrap.fill(name, 34))
        grid[0][0].set_ylabel("clean")
        grid[1][0].set_ylabel("adversarial")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def feature_caption(images: Images, threat: Threat, class_names: Sequence[str]) -> str:
    """Return the caption of maps of these images: what they show, how they were made, and their limits."""
    return (
        f"t-SNE of the inputs of the last linear layer (penultimate features), for {len(images)} test images, the "
        f"first of {len(class_names)} classes ({', '.join(class_names)}): clean above, and below their adversarial "
        f"examples by {_STEPS} whole steps of PGD inside {threat}. Both share one map for each model, so that they can "
        f"be compared; perplexity {_perplexity(images):g}, seed 0, started at the principal components. t-SNE keeps "
        "neighbours together: distances between clusters, and their sizes, mean little, and maps cannot be compared."
    )


def _embedded(weights: Weights, images: Images, threat: Threat, device: torch.device) -> FeatureMap:
    from sklearn.manifold import TSNE

    net = load(weights).to(device)
    tapped = models.Tapped(net, ("penultimate",), frozen=True)
    # All steps: images that stop once they fool the network lie just beyond the boundary, near their start.
    attack = attacks.PGD(threat, steps=_STEPS, until_fooled=False)
    clean, adversarial = [], []
    images = images.to(device)
    for rows in torch.arange(len(images), device=device).split(_BATCH):
        x = images.floats(rows)
        with seeded("features", int(rows[0])):
            x_adv = attack(net, x, images.labels[rows])
        clean.append(tapped(x).features["penultimate"].cpu())
        adversarial.append(tapped(x_adv).features["penultimate"].cpu())
    features = torch.cat([*clean, *adversarial]).numpy()
    points = TSNE(perplexity=_perplexity(images), init="pca", random_state=0).fit_transform(features)
    clean_points, adversarial_points = np.split(points, 2)
    return FeatureMap(clean_points, adversarial_points, images.labels.cpu().numpy())


def _perplexity(images: Images) -> float:
    """Return the usual perplexity; for few images, a quarter of the number of points."""
    return min(_PERPLEXITY, len(images) / 2)
