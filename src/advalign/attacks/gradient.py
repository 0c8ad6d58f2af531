"""FGSM, PGD and MIM: attacks that follow the sign of a gradient, as values `attack(model, x, y) -> x_adv`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from advalign.attacks.ascent import AttackLoss, Start, projected_gradient_ascent
from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.goal import Goal
from advalign.attacks.losses import cross_entropy, kl_divergence, margin
from advalign.attacks.targets import Target, check_target, choose_targets, pursue
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels
from advalign.threats import Threat, check_step_size


def _check_step_size(name: str, step_size: float | None) -> None:
    require(step_size is None or step_size > 0, lambda: f"{name}: step_size={step_size} must be above 0")


def _step_size(name: str, threat: Threat, step_size: float | None) -> float:
    """Return the step size, a quarter of the radius (2/255 of 8/255) where none is given.

    Asked for when the attack runs: a spelling is read before its threat is known, to find mistakes early.
    """
    if step_size is None:
        return threat.eps / 4
    check_step_size(name, step_size, threat)
    return step_size


@dataclass(frozen=True)
class FGSM(Attack):
    """One step of the whole radius from the clean image. Goodfellow et al. 2015; no random start.

    In L1 it is spread over the twentieth of the pixel channels with the largest gradients.

    Args:
        target: as for PGD.

    Raises:
        UserError: a target that is no class.
    """

    name: ClassVar[str] = "fgsm"
    transfers: ClassVar[bool] = True
    target: Target = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_target(self.name, self.target)

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""

        def step(x: Tensor, goal: Goal) -> Tensor:
            attack_loss, eps = AttackLoss(model, goal.loss(cross_entropy), goal.classes), self.threat.eps
            return projected_gradient_ascent(attack_loss, x, self.threat, steps=1, step_size=eps, start="clean")

        return pursue(self, model, x, y, step)

    def target_classes(self, model: nn.Module, x: ImageBatch, y: Labels) -> Labels | None:
        """Return the class (N,) to which each image is driven; None without target."""
        return choose_targets(self.target, self, model, x, y)


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient ascent from a uniform start, the worst over the steps and restarts. Madry et al. 2018.

    Args:
        step_size: in the unit of the pixels; a quarter of the radius (2/255 of 8/255) if not given.
        loss: `ce`; `kl` to the clean prediction, as TRADES trains; or `margin`, the C&W loss: PGD with it is what
            many papers call CW-inf.
        until_fooled: keep the first iterate that is misclassified, at least as strong as the last iterate and less
            work; false gives the last iterate, as papers before AutoAttack report it. With a target, the first that is
            classified as the target.
        target: a class by its number, or `next`, the class after the label; `least-likely`, the wrong class of the
            smallest logit; `random`, one of the wrong classes. Then the image is to be classified as that, not just
            misclassified.

    Raises:
        UserError: steps, restarts or step_size out of range, unknown loss, start or target.
    """

    name: ClassVar[str] = "pgd"
    transfers: ClassVar[bool] = True
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    loss: Literal["ce", "kl", "margin"] = "ce"
    start: Start = "uniform"
    until_fooled: bool = True
    target: Target = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_step_size(self.name, self.step_size)
        check_target(self.name, self.target)
        stuck = self.loss == "kl" and self.start == "clean"
        require(not stuck, "pgd: the kl loss is flat at the clean image; start=clean needs another loss")
        aimless = self.loss == "kl" and self.target is not None
        require(not aimless, "pgd: the kl loss leads away from the clean prediction; target needs another loss")

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""

        def climb(x: Tensor, goal: Goal) -> Tensor:
            def attempt(rows: Tensor) -> Tensor:
                return projected_gradient_ascent(
                    self._attack_loss(model, x[rows], goal.take(rows)),
                    x[rows],
                    self.threat,
                    steps=self.steps,
                    step_size=_step_size(self.name, self.threat, self.step_size),
                    start=self.start,
                    goal=goal.take(rows) if self.until_fooled else None,
                )

            return attack_survivors(model, x, goal, [attempt] * self.restarts, first_on_all=True)

        return pursue(self, model, x, y, climb)

    def target_classes(self, model: nn.Module, x: ImageBatch, y: Labels) -> Labels | None:
        """Return the class (N,) to which each image is driven; None without target."""
        return choose_targets(self.target, self, model, x, y)

    def _attack_loss(self, model: nn.Module, x: Tensor, goal: Goal) -> AttackLoss:
        if self.loss == "kl":
            with torch.no_grad():
                return AttackLoss(model, kl_divergence, model(x))
        return AttackLoss(model, goal.loss({"ce": cross_entropy, "margin": margin}[self.loss]), goal.classes)


@dataclass(frozen=True)
class MIM(Attack):
    """Momentum iterative FGSM from the clean image. Dong et al. 2018, with decay 1; `until_fooled` as for PGD.

    Args:
        target: as for PGD.

    Raises:
        UserError: steps, step_size or decay out of range, or a target that is no class.
    """

    name: ClassVar[str] = "mim"
    transfers: ClassVar[bool] = True
    steps: int = 20
    step_size: float | None = None
    decay: float = 1.0
    until_fooled: bool = True
    target: Target = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_step_size(self.name, self.step_size)
        check_target(self.name, self.target)
        require(self.decay >= 0, lambda: f"mim: decay={self.decay} must be at least 0")

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""

        def climb(x: Tensor, goal: Goal) -> Tensor:
            return projected_gradient_ascent(
                AttackLoss(model, goal.loss(cross_entropy), goal.classes),
                x,
                self.threat,
                steps=self.steps,
                step_size=_step_size(self.name, self.threat, self.step_size),
                start="clean",
                momentum=self.decay,
                goal=goal if self.until_fooled else None,
            )

        return pursue(self, model, x, y, climb)

    def target_classes(self, model: nn.Module, x: ImageBatch, y: Labels) -> Labels | None:
        """Return the class (N,) to which each image is driven; None without target."""
        return choose_targets(self.target, self, model, x, y)
