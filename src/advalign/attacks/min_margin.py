"""The image in the ball at which a network is least sure of the true class: what mixing with any other may cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks.apgd import auto_pgd
from advalign.attacks.ascent import AttackLoss
from advalign.attacks.contract import Attack
from advalign.attacks.losses import cross_entropy, probability_margin, targeted_margin
from advalign.attacks.targets import pairs_with_wrong_classes
from advalign.shapes import ImageBatch, Labels, PerImage


@dataclass(frozen=True)
class MinMargin(Attack):
    """Auto-PGD for the least margin of probabilities, by several losses. After Bai et al. 2024 (MixedNUTS), section 5.

    One run on the cross entropy, one on the margin of probabilities, and one towards each of the likeliest wrong
    classes. It does not end where an image is misclassified only by others: of an image that withstands, the point of
    the least margin is returned, not the clean image. That margin bounds what a mix with any other network can lose.

    Args:
        targets: how many classes to try; at most all that are wrong.

    Raises:
        UserError: steps or targets out of range.
    """

    name: ClassVar[str] = "min-margin"
    transfers: ClassVar[bool] = True
    steps: int = 100
    targets: int = 9

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        result, worst = x.clone(), _margins(model, x, y)
        for attack_loss in self._attack_losses(model, x, y):
            rows = (worst <= 0).nonzero().squeeze(1)  # a broken image is broken in every mix that trusts this network
            if not len(rows):
                break
            of_rows = attack_loss._replace(target=attack_loss.target[rows])
            x_adv = auto_pgd(of_rows, x[rows], y[rows], self.threat, steps=self.steps)
            now = _margins(model, x_adv, y[rows])
            better = now > worst[rows]
            result[rows[better]], worst[rows[better]] = x_adv[better], now[better]
        return result

    def _attack_losses(self, model: nn.Module, x: Tensor, y: Tensor) -> Iterator[AttackLoss]:
        yield AttackLoss(model, cross_entropy, y)
        yield AttackLoss(model, probability_margin, y)
        for pair in pairs_with_wrong_classes(model, x, y, self.targets):
            yield AttackLoss(model, targeted_margin, pair)


def _margins(model: nn.Module, x: ImageBatch, y: Labels) -> PerImage:
    with torch.no_grad():
        return probability_margin(model(x), y)
