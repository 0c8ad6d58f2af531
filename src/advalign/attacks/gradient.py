"""FGSM, PGD and MIM: attacks that follow the sign of a gradient, as values `attack(model, x, y) -> x_adv`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from advalign.attacks.ascent import AttackLoss, Start, projected_gradient_ascent
from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.losses import cross_entropy, kl_divergence, margin
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels
from advalign.threats import Threat


def _check_step_size(name: str, step_size: float | None) -> None:
    require(step_size is None or step_size > 0, lambda: f"{name}: step_size={step_size} must be above 0")


def _step_size(name: str, threat: Threat, step_size: float | None) -> float:
    """Return the step size, a quarter of the radius (2/255 of 8/255) where none is given.

    Asked for when the attack runs: a spelling is read before its threat is known, to find mistakes early.
    """
    if step_size is None:
        return threat.eps / 4
    hint = f": for images in [0, 1] write {step_size:g}/255" if step_size >= 0.5 else ""
    least = f"{name}: step_size={step_size:g} crosses the whole of {threat} in a step{hint}"
    require(step_size <= 2 * threat.eps * (1 + 1e-6) or threat.eps == 0, lambda: least)
    return step_size


@dataclass(frozen=True)
class FGSM(Attack):
    """One step of the whole radius from the clean image. Goodfellow et al. 2015; no random start."""

    name: ClassVar[str] = "fgsm"
    transfers: ClassVar[bool] = True

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        attack_loss = AttackLoss(model, cross_entropy, y)
        return projected_gradient_ascent(attack_loss, x, self.threat, steps=1, step_size=self.threat.eps, start="clean")


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent from a uniform start, the worst over the steps and restarts. Madry et al. 2018.

    Args:
        step_size: in the unit of the pixels; a quarter of the radius (2/255 of 8/255) if not given.
        loss: `ce`; `kl` to the clean prediction, as TRADES trains; or `margin`, the C&W loss: PGD with it is what
            many papers call CW-inf.
        until_fooled: keep the first iterate that is misclassified, at least as strong as the last iterate and less
            work; false gives the last iterate, as papers before AutoAttack report it.

    Raises:
        UserError: steps, restarts or step_size out of range, unknown loss or start.
    """

    name: ClassVar[str] = "pgd"
    transfers: ClassVar[bool] = True
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    loss: Literal["ce", "kl", "margin"] = "ce"
    start: Start = "uniform"
    until_fooled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_step_size(self.name, self.step_size)
        stuck = self.loss == "kl" and self.start == "clean"
        require(not stuck, "pgd: the kl loss is flat at the clean image; start=clean needs another loss")

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""

        def attempt(rows: Tensor) -> Tensor:
            return projected_gradient_ascent(
                self._attack_loss(model, x[rows], y[rows]),
                x[rows],
                self.threat,
                steps=self.steps,
                step_size=_step_size(self.name, self.threat, self.step_size),
                start=self.start,
                labels=y[rows] if self.until_fooled else None,
            )

        return attack_survivors(model, x, y, [attempt] * self.restarts, first_on_all=True)

    def _attack_loss(self, model: nn.Module, x: Tensor, y: Tensor) -> AttackLoss:
        if self.loss == "kl":
            with torch.no_grad():
                return AttackLoss(model, kl_divergence, model(x))
        return AttackLoss(model, {"ce": cross_entropy, "margin": margin}[self.loss], y)


@dataclass(frozen=True)
class MIM(Attack):
    """Momentum iterative FGSM from the clean image. Dong et al. 2018, with decay 1; `until_fooled` as for PGD.

    Raises:
        UserError: steps, step_size or decay out of range.
    """

    name: ClassVar[str] = "mim"
    transfers: ClassVar[bool] = True
    steps: int = 20
    step_size: float | None = None
    decay: float = 1.0
    until_fooled: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_step_size(self.name, self.step_size)
        require(self.decay >= 0, lambda: f"mim: decay={self.decay} must be at least 0")

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""
        return projected_gradient_ascent(
            AttackLoss(model, cross_entropy, y),
            x,
            self.threat,
            steps=self.steps,
            step_size=_step_size(self.name, self.threat, self.step_size),
            start="clean",
            momentum=self.decay,
            labels=y if self.until_fooled else None,
        )
