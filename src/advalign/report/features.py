"""t-SNE of a network's clean and adversarial features: computed once, kept in a file, drawn side by side."""

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
from advalign.report.figures import HOVER
from advalign.runs import Weights, load
from advalign.runtime.files import write_atomically
from advalign.runtime.seeds import seeded
from advalign.threats import Threat

_BATCH = 500
_PERPLEXITY = 30
_STEPS = 20
_MARKERS = "os^Dv"  # beside the colours, for who cannot tell these apart


class FeatureMap(NamedTuple):
    """Places in the plane of the features of N images and of their adversarial examples."""

    clean: NDArray[np.float32]  # (N, 2)
    adversarial: NDArray[np.float32]  # (N, 2)
    labels: NDArray[np.int64]  # (N,)


def few(images: Images, *, classes: int, each: int) -> Images:
    """Return the first images of the first classes; fewer of a class that has fewer."""
    rows = [(images.labels == label).nonzero()[:each, 0] for label in range(classes)]
    return images.take(torch.cat(rows))


def feature_map(weights: Weights, images: Images, threat: Threat, device: torch.device, kept: Path) -> FeatureMap:
    """Return the map of a network, from the file if it was made before; adversarial images by PGD-20.

    Features are what the last linear layer reads. Van der Maaten and Hinton 2008, perplexity 30, begun at the principal
    components; clean and adversarial ones in one map.

    Raises:
        UserError: the network cannot be built, or has no linear layer.
    """
    if not kept.exists():
        content = io.BytesIO()
        np.savez(content, **_embedded(weights, images, threat, device)._asdict())
        write_atomically(kept, content.getvalue())
    with np.load(kept) as file:
        return FeatureMap(**file)


def feature_maps(maps: Mapping[str, FeatureMap], class_names: Sequence[str]) -> Figure:
    """Draw maps side by side, clean features above adversarial ones, a colour and a mark a class.

    Args:
        class_names: of the labels that the maps have, from 0.
    """
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.6 * len(maps) + 0.4, 5.4), layout="constrained")
        grid = figure.subplots(2, len(maps), squeeze=False, sharex="col", sharey="col")
        for column, (name, found) in enumerate(maps.items()):
            size = min(10, max(2, 2500 / len(found.labels)))
            for axes, places in zip(grid[:, column], (found.clean, found.adversarial), strict=True):
                for label, told in enumerate(class_names):
                    axes.scatter(
                        *places[found.labels == label].T, s=size, color=f"C{label}", linewidths=0, label=told,
                        marker=_MARKERS[label % len(_MARKERS)], gid=HOVER + told,
                    )  # fmt: skip
                axes.set(xticks=[], yticks=[])
            grid[0][column].set_title(textwrap.fill(name, 34))
        grid[0][0].set_ylabel("clean")
        grid[1][0].set_ylabel("adversarial")
        handles, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def explained(images: Images, threat: Threat, class_names: Sequence[str]) -> str:
    """Return what a reader must know of the maps of these images: what they show, how they were made, their limits."""
    return (
        f"t-SNE of what the last linear layer reads (penultimate), for {len(images)} test images, the first ones of "
        f"{len(class_names)} classes ({', '.join(class_names)}): clean above, and below what PGD makes of them in "
        f"{_STEPS} whole steps inside {threat}. Both lie in one map a model, so that they can be compared; perplexity "
        f"{_perplexity(images):g}, seed 0, begun at the principal components. t-SNE keeps neighbours together: "
        "distances between clusters, and their sizes, mean little, and nothing can be compared from map to map."
    )


def _embedded(weights: Weights, images: Images, threat: Threat, device: torch.device) -> FeatureMap:
    from sklearn.manifold import TSNE

    net = load(weights).to(device)
    tapped = models.Tapped(net, ("penultimate",), frozen=True)
    # To the end: images that stop once they are fooled lie just beyond the boundary, beside where they began.
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
    places = TSNE(perplexity=_perplexity(images), init="pca", random_state=0).fit_transform(features)
    clean_places, adversarial_places = np.split(places, 2)
    return FeatureMap(clean_places, adversarial_places, images.labels.cpu().numpy())


def _perplexity(images: Images) -> float:
    """Return the usual one; of few images, as many neighbours as a quarter of the points."""
    return min(_PERPLEXITY, len(images) / 2)
