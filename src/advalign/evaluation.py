"""Clean and robust accuracy, image by image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from advalign.attacks import Attack, spelled
from advalign.data import Images
from advalign.errors import require
from advalign.models.fold import Folded
from advalign.models.modes import evaluating
from advalign.runtime import autocast, seeded
from advalign.threats import check_images

WORST_CASE = "worst case"


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model gets right, image by image.

    `correct` maps `clean` and each attack's spelling to a boolean tensor (N,): still classified as its label.
    """

    correct: Mapping[str, Tensor]
    seconds: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.correct["clean"])

    @property
    def outcomes(self) -> dict[str, Tensor]:
        """`correct` and, where there are attacks, the worst case: images that withstand all of them."""
        if len(self.correct) == 1:
            return dict(self.correct)
        return {**self.correct, WORST_CASE: torch.stack(tuple(self.correct.values())).all(0)}

    def accuracies(self) -> dict[str, float]:
        """Return each outcome's share of correct images, in [0, 1]."""
        return {name: float(outcome.double().mean()) for name, outcome in self.outcomes.items()}


def evaluate(
    model: nn.Module,
    images: Images,
    attacks: Sequence[Attack] = (),
    *,
    batch_size: int = 512,
    precision: str = "fp32",
    seed: int = 0,
    advance: Callable[[str, int], None] = lambda attack, done: None,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack.

    Only images that are classified correctly are attacked: the others are lost already. Attacks run on a copy with
    BatchNorm folded into the convolutions, in the given precision; whether an image withstands one is decided by the
    unmodified model in fp32. The model and the random state are left as they were.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K), on the images' device.
        advance: called with an attack's spelling and the number of images just finished, for a progress bar.

    Raises:
        UserError: two attacks have one spelling, or an attack leaves its threat model.
    """
    names = [spelled(attack) for attack in attacks]
    for name in names:
        require(names.count(name) == 1, f"attack {name} is given twice: results go by spelling")
    correct: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    with evaluating(model):
        began = time.monotonic()
        everything = torch.arange(len(images), device=images.labels.device)
        correct["clean"] = torch.zeros(len(images), dtype=torch.bool, device=everything.device)
        for rows in everything.split(batch_size):
            correct["clean"][rows] = _correct(model, images.floats(rows), images.labels[rows])
            advance("clean", len(rows))
        seconds["clean"] = time.monotonic() - began
        fast = Folded(model)
        for name, attack in zip(names, attacks, strict=True):
            began = time.monotonic()
            correct[name] = torch.zeros_like(correct["clean"])
            alive = everything[correct["clean"]]
            advance(name, len(images) - len(alive))
            with seeded(seed, name):
                for rows in alive.split(batch_size) if len(alive) else ():
                    x, y = images.floats(rows), images.labels[rows]
                    with autocast(x.device, precision):
                        x_adv = attack(fast, x, y)
                    _check_budget(name, attack, x_adv, x)
                    correct[name][rows] = _correct(model, x_adv, y)
                    advance(name, len(rows))
            seconds[name] = time.monotonic() - began
    return Evaluation({name: flags.cpu() for name, flags in correct.items()}, seconds)


@torch.no_grad()
def _correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return model(x).argmax(1) == y


def _check_budget(name: str, attack: Attack, x_adv: Tensor, x: Tensor) -> None:
    check_images(x_adv)
    moved = float(attack.threat.distance(x_adv, x).max())
    # A hair's breadth for rounding in fp32.
    require(moved <= attack.threat.eps + 1e-5, f"{name} moved an image by {moved:g}, outside {attack.threat}")
