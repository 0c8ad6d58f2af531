"""How the adversarial images of training are made: PGD, or with fewer passes. `--attack` of `advalign train`.

The cheap ones have the settings of their authors as defaults; their lengths are shares of the radius.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, final

import torch
from torch import Tensor

from advalign.attacks.ascent import TrainingStart
from advalign.data.batches import Placement
from advalign.errors import UserError, require, shorten
from advalign.objectives import Method, Objective
from advalign.runtime import ranks
from advalign.spelling import construct, parse_calls, spell
from advalign.threats import Threat, ascent_step
from advalign.training.recipes import Recipe

Mode = Literal["eval", "train"]


class Batch(NamedTuple):
    """What a training attack is given."""

    x: Tensor  # (N, C, H, W) in [0, 1]
    y: Tensor  # (N,)
    second: Tensor | None = None  # further augmentations of the same images
    placement: Placement | None = None  # where they were cut out, for an attack that remembers by image


class TrainingAttack:
    """Makes the adversarial images of a step. What it remembers between steps is part of the run's state."""

    name: ClassVar[str]
    guarded: ClassVar[bool] = True
    """Whether a network may overfit to it catastrophically, so that the guard watches."""
    replays: int = 1
    """Updates in a row that each batch serves."""
    remembers: ClassVar[bool] = False
    placed: ClassVar[bool] = False
    """Whether it remembers by image, and so needs to know where each was cut out of its frame."""

    def __str__(self) -> str:
        return spell(self.name, type(self), vars(self))

    @property
    def passes(self) -> float:
        """Forward passes of the student in a step, and as many backward ones, beside those of the update."""
        return 1

    def perturb(
        self, objective: Objective, batch: Batch, threat: Threat, step_size: float | None, mode: Mode | None
    ) -> Tensor:
        """Return adversarial images for a batch.

        Args:
            step_size: of the recipe, which PGD alone goes by.
            mode: of the student during the attack; the attack's or the method's own if None.
        """
        raise NotImplementedError(f"{self.name} makes no images")

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Go by this epoch's number, from 0."""

    def after_update(self, x: Tensor, x_adv: Tensor, threat: Threat) -> None:
        """Learn from the update, whose backward pass may have given `x_adv` a gradient."""

    def state(self) -> dict[str, Tensor]:
        """Return what it remembers."""
        return {}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take over what it remembered."""


@final
class PGD(TrainingAttack):
    """Projected gradient ascent, by the recipe's steps, step size and start.

    Args:
        steps: their numbers in parts of the training of equal length.
        start: the method's own if None.
    """

    name = "pgd"
    guarded = False

    def __init__(self, steps: tuple[int, ...], start: TrainingStart | None = None) -> None:
        self.all_steps, self.steps = steps, steps[0]
        self.start: TrainingStart | None = start

    @property
    def passes(self) -> float:
        """The mean of the parts of the training."""
        return sum(self.all_steps) / len(self.all_steps)

    def perturb(
        self, objective: Objective, batch: Batch, threat: Threat, step_size: float | None, mode: Mode | None
    ) -> Tensor:
        """Return adversarial images for a batch."""
        return objective.perturb(
            batch.x, batch.y, threat, second=batch.second, steps=self.steps, step_size=step_size, start=self.start,
            mode=mode,
        )  # fmt: skip

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Take the number of steps of this part of the training."""
        self.steps = self.steps_of(epoch, epochs)

    def steps_of(self, epoch: int, epochs: int) -> int:
        """Return the number of steps in an epoch, from 0."""
        return self.all_steps[epoch * len(self.all_steps) // epochs]


@dataclass
class _OneStep(TrainingAttack):
    """A single step, the student in train mode, as in the code of both authors.

    Args:
        step: length of the step.
    """

    start: ClassVar[TrainingStart]
    step: float

    def __post_init__(self) -> None:
        _check_step(self.name, self.step)

    def perturb(
        self, objective: Objective, batch: Batch, threat: Threat, step_size: float | None, mode: Mode | None
    ) -> Tensor:
        """Return adversarial images for a batch."""
        return objective.perturb(
            batch.x, batch.y, threat, second=batch.second, steps=1, step_size=self.step * threat.eps, start=self.start,
            mode=mode or "train",
        )  # fmt: skip


@final
@dataclass
class NFGSM(_OneStep):
    """One step from a uniform start in twice the ball, bounded by [0, 1] alone. De Jorge et al. 2022 (NeurIPS).

    The images may lie three radii away. They see noise that no gradient bends, which keeps the network from making
    its loss flat at the single point where a one-step attack looks.
    """

    name = "n-fgsm"
    start = "wide"
    step: float = 1.0


@final
@dataclass
class FGSMRS(_OneStep):
    """One long step from a uniform start in the ball, projected back into it. Wong, Rice and Kolter 2020 (ICLR).

    The cheapest, and the one that overfits catastrophically most readily: at larger radii, with wider networks, in
    longer trainings.
    """

    name = "fgsm-rs"
    start = "uniform"
    step: float = 1.25


@final
@dataclass
class Free(TrainingAttack):
    """Each batch m times in a row; the update's own backward pass moves the images as well. Shafahi et al. 2019.

    No pass but those of the update. The images climb the whole loss of the method. The perturbation is handed on from
    batch to batch, as by the authors, who begin with none; here it begins uniformly in the ball, since the loss of
    TRADES and its kin has no slope at the clean images. An epoch is as many updates as otherwise, so that it walks
    through an m-th of the batches.

    Args:
        m: how often.
    """

    name = "free"
    remembers = True
    m: int = 8
    delta: Tensor | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require(1 <= self.m <= 100, lambda: f"free: m={self.m} must be in 1 to 100")
        self.replays = self.m

    @property
    def passes(self) -> float:
        """None."""
        return 0

    def perturb(
        self, objective: Objective, batch: Batch, threat: Threat, step_size: float | None, mode: Mode | None
    ) -> Tensor:
        """Return adversarial images for a batch, which the update's backward pass will give a gradient."""
        if self.delta is None:
            self.delta = threat.draw(torch.zeros_like(batch.x))
        return (batch.x + self.delta).clamp_(0, 1).requires_grad_()

    def after_update(self, x: Tensor, x_adv: Tensor, threat: Threat) -> None:
        """Step by a whole radius up the gradient of the loss."""
        assert self.delta is not None
        if x_adv.grad is not None:
            # As in the authors' loop, no gradient reaches a pixel that the perturbation has pushed out of [0, 1].
            inside = x + self.delta == x_adv.detach()
            step = threat.eps * ascent_step(threat, inside * x_adv.grad.nan_to_num(0.0, 0.0, 0.0))
            self.delta = threat.limited(self.delta + step)

    def state(self) -> dict[str, Tensor]:
        """Return the perturbation."""
        return {} if self.delta is None else {"delta": ranks.gather(self.delta)}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take over the perturbation."""
        self.delta = ranks.own_rows(state["delta"].to(device)) if state else None


@final
@dataclass
class ATTA(TrainingAttack):
    """A few steps from where the attack on the same image ended in the epoch before. Zheng et al. 2020 (CVPR).

    The perturbation of each training image is kept in the frame that crops are cut from, and goes through the same
    crop and flip as the image. In fp16: for 50,000 images of 32 x 32 in 3 channels 480 MB.

    Args:
        steps: how many; step: length of each. The authors take 0.015 at a radius of 0.031, with one step.
        reset: epochs after which all perturbations are forgotten.
    """

    name = "atta"
    remembers = placed = True
    steps: int = 1
    step: float = 0.5
    reset: int = 10
    deltas: Tensor | None = field(default=None, init=False, repr=False)
    fresh: bool = field(default=True, init=False, repr=False)
    """Whether this epoch forgets the perturbation of each image that it comes to."""

    def __post_init__(self) -> None:
        _check_step(self.name, self.step)
        require(1 <= self.steps <= 100, lambda: f"atta: steps={self.steps} must be in 1 to 100")
        require(self.reset >= 1, lambda: f"atta: reset={self.reset} must be at least 1")

    @property
    def passes(self) -> float:
        """One for each step."""
        return self.steps

    def perturb(
        self, objective: Objective, batch: Batch, threat: Threat, step_size: float | None, mode: Mode | None
    ) -> Tensor:
        """Return adversarial images for a batch, and keep how far they have moved."""
        x, placed = batch.x, batch.placement
        assert placed is not None
        if self.deltas is None:
            self.deltas = torch.zeros(placed.images, x.shape[1], *placed.frame, dtype=torch.float16, device=x.device)
        everywhere = placed.of_all_ranks()
        if self.fresh:
            self.deltas[everywhere.rows] = 0
            start = x + 0.001 * ranks.draw(torch.randn_like, x)
        else:
            start = x + placed.cut(self.deltas).to(x.dtype)
        x_adv = objective.perturb(
            x, batch.y, threat, second=batch.second, steps=self.steps, step_size=self.step * threat.eps, start=start,
            mode=mode,
        )  # fmt: skip
        everywhere.paste(self.deltas, ranks.gather((x_adv - x).to(torch.float16)))
        return x_adv

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Forget the perturbations now and then."""
        self.fresh = epoch % self.reset == 0

    def state(self) -> dict[str, Tensor]:
        """Return all perturbations."""
        return {} if self.deltas is None else {"deltas": self.deltas}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take over all perturbations."""
        self.deltas = state["deltas"].to(device) if state else None


@final
@dataclass
class FGSMPGI(TrainingAttack):
    """One step from what the momentum of the gradients of the epochs before made. FGSM-MEP of Jia et al. 2022 (ECCV).

    Of each training image a perturbation and a momentum are kept, in fp16: for 50,000 images of 32 x 32 in 3 channels
    610 MB. Both are in the frame of the crop, and are not moved with it: what an image starts from belongs to another
    crop of it, as in the authors' code. Their regularisation is the plug-in `pgi`.

    Args:
        step: length of the step.
        decay: of the momentum, to which each gradient is added, divided by its mean magnitude over the batch.
        reset: epochs after which all are forgotten; then each image starts in a random corner of the ball.
    """

    name = "fgsm-pgi"
    remembers = placed = True
    step: float = 1.0
    decay: float = 0.3
    reset: int = 40
    deltas: Tensor | None = field(default=None, init=False, repr=False)
    momenta: Tensor | None = field(default=None, init=False, repr=False)
    fresh: bool = field(default=True, init=False, repr=False)
    """Whether this epoch forgets what is kept of each image that it comes to."""

    def __post_init__(self) -> None:
        _check_step(self.name, self.step)
        require(0 <= self.decay < 1, lambda: f"fgsm-pgi: decay={self.decay:g} must be at least 0 and below 1")
        require(self.reset >= 1, lambda: f"fgsm-pgi: reset={self.reset} must be at least 1")

    def perturb(
        self, objective: Objective, batch: Batch, threat: Threat, step_size: float | None, mode: Mode | None
    ) -> Tensor:
        """Return adversarial images for a batch, and keep where the next attack on them starts."""
        x, placed = batch.x, batch.placement
        if objective.method.base.training_attack is None:
            return x
        assert placed is not None
        if self.deltas is None or self.momenta is None:
            kept = torch.zeros(placed.images, *x.shape[1:], dtype=torch.float16, device=x.device)
            self.deltas, self.momenta = kept, kept.clone()
        if self.fresh:
            noise = ranks.draw(torch.randn_like, x)
            delta, momentum = threat.eps * ascent_step(threat, noise), torch.zeros_like(x)
        else:
            delta, momentum = (kept[placed.rows].to(x.dtype) for kept in (self.deltas, self.momenta))
        grad = objective.attack_gradient(x, batch.y, threat, x + delta, second=batch.second, mode=mode or "train")
        # By the mean where the authors take the sum, which fp16 could not hold; of momenta the signs alone count.
        mean = ranks.batch_mean(grad.abs().mean())
        momentum = self.decay * momentum + grad / mean.clamp_min(torch.finfo(grad.dtype).tiny)

        def moved(direction: Tensor) -> Tensor:
            step = self.step * threat.eps * ascent_step(threat, direction)
            return (x + threat.limited(delta + step)).clamp_(0, 1)

        rows = ranks.gather(placed.rows)
        self.deltas[rows] = ranks.gather((moved(momentum) - x).to(torch.float16))
        self.momenta[rows] = ranks.gather(momentum.clamp(-_MOST, _MOST).to(torch.float16))
        return moved(grad)

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Forget perturbations and momenta now and then."""
        self.fresh = epoch % self.reset == 0

    def state(self) -> dict[str, Tensor]:
        """Return all perturbations and momenta."""
        return {} if self.deltas is None or self.momenta is None else {"deltas": self.deltas, "momenta": self.momenta}

    def load(self, state: dict[str, Tensor], device: torch.device) -> None:
        """Take over all perturbations and momenta."""
        self.deltas, self.momenta = (state[name].to(device) if state else None for name in ("deltas", "momenta"))


_MOST = 1e4  # of a momentum, where fp16 ends at 6.5e4

CHEAP: dict[str, type[TrainingAttack]] = {attack.name: attack for attack in (NFGSM, FGSMRS, Free, ATTA, FGSMPGI)}


def training_attack(recipe: Recipe) -> TrainingAttack:
    """Return the training attack that a recipe names.

    Raises:
        UserError: an unknown one, or an argument out of range.
    """
    calls = parse_calls(recipe.attack)
    require(len(calls) == 1, lambda: f"attack={shorten(recipe.attack)} names {len(calls)} attacks: choose one")
    (call,) = calls
    if call.name != PGD.name:
        return construct("training attack", call, {PGD.name: PGD, **CHEAP})
    require(not call.arguments, "attack=pgd takes no arguments: give --steps, --step-size and --start")
    return PGD(recipe.all_steps, recipe.start)


def check_attack(attack: TrainingAttack, method: Method, recipe: Recipe, *, extra: bool) -> None:
    """Refuse a training attack that cannot work with a method or a recipe.

    Raises:
        UserError: it does not ask for the threat model, which a part of the method decides; it remembers
            perturbations, and the method attacks several augmentations; or it remembers them by image, and there are
            generated images, or an augmentation of which a perturbation cannot be part.
    """
    method_name, bounding = shorten(str(method)), method.replacing("threat")
    require(
        bounding is None or not isinstance(attack, NFGSM | Free | FGSMPGI),
        lambda: f"attack={attack} goes by the radius alone, and {bounding and bounding.name!r} decides it by pixel",
    )
    reader = next((plugin.name for plugin in method.plugins if plugin.reads_start), None)
    require(
        reader is None or not isinstance(attack, NFGSM | Free),
        lambda: f"{reader} reads where the attack starts, which attack={attack} does not tell: take fgsm-pgi",
    )
    if not attack.remembers:
        return
    require(
        method.augmentations == 1,
        lambda: f"attack={attack} keeps one perturbation for an image, and {method_name} attacks several augmentations",
    )
    if attack.placed:
        require(not extra, lambda: f"attack={attack} keeps a perturbation for each image, and cannot for extra data")
        if recipe.augment not in ("none", "flip", "flip-crop"):
            raise UserError(
                f"attack={attack} goes through crop and flip: augment={recipe.augment} must be one of none, flip, "
                "flip-crop"
            )


def _check_step(name: str, step: float) -> None:
    require(0 < step <= 2, lambda: f"{name}: step={step:g} must be above 0 and at most 2: a share of the radius")
