"""The gallery of adversarial examples: original, adversarial image and their difference, for each model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure
from torch import Tensor

_CAPTION_WIDTH = 20  # letters that fit below an image

GalleryRows = Mapping[str, tuple[Tensor, Tensor, Sequence[str]]]
"""By model, images (N, C, H, W) in [0, 1], adversarial images, and a caption of a few lines for each."""


def gallery(rows: GalleryRows, amplify: float) -> Figure:
    """Show originals, adversarial examples and their difference around grey, three rows of images for each model.

    Args:
        amplify: factor of the difference.
    """
    columns = len(next(iter(rows.values()))[2])
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(1.05 * columns + 1.6, 3.6 * len(rows)), layout="constrained")
        grid = figure.subplots(3 * len(rows), columns, squeeze=False)
        for i, (name, (x, x_adv, captions)) in enumerate(rows.items()):
            difference = (0.5 + amplify * (x_adv - x)).clamp(0, 1)
            for k, (title, images) in enumerate(
                ((f"{name}\noriginal", x), ("adversarial", x_adv), (f"difference × {amplify:g}", difference))
            ):
                for axes, image, caption in zip(grid[3 * i + k], images, captions, strict=True):
                    shown = image.permute(1, 2, 0).squeeze(-1).numpy()
                    axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
                    axes.set(xticks=[], yticks=[])
                    if k == 1:
                        lines = [textwrap.fill(line, _CAPTION_WIDTH) for line in caption.split("\n")]
                        axes.set_xlabel("\n".join(lines), fontsize=7)
                grid[3 * i + k][0].set_ylabel(title, rotation=0, ha="right", va="center")
    return figure


def gallery_in_words(rows: GalleryRows) -> str:
    """Return the captions as one text, for readers who do not see the gallery."""
    return " ".join(
        f"{name}: {'; '.join(', '.join(caption.splitlines()) for caption in captions)}."
        for name, (_, _, captions) in rows.items()
    )
