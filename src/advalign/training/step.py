"""What a training does with a batch: adversarial images, then an update of all that learns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import final

import torch
from torch import Tensor

from advalign.data.batches import Placement
from advalign.models.norm_statistics import set_norm_momentum
from advalign.models.split_norm import View, using_norms
from advalign.models.synced_norm import average_statistics
from advalign.objectives import Objective, total
from advalign.objectives.contract import Terms
from advalign.runtime import ranks
from advalign.runtime.cuda_graphs import CudaGraphed
from advalign.runtime.device import autocast
from advalign.threats import make_threat
from advalign.training.attacks import Batch, TrainingAttack, training_attack
from advalign.training.loss_scale import LossScale
from advalign.training.recipes import Recipe
from advalign.training.schedule import learning_rate, momentum
from advalign.training.weight_perturbation import adversarial_weights


@final
class Step:
    """An objective with its recipe's optimiser and attack; `schedule`, then `perturb`, then `update`.

    Args:
        steps: batches an epoch, which the schedule counts in.
        cuda_graphs: record `perturb` and `update` as CUDA graphs; each epoch anew, since the parts may have learnt
            something at its start. Their results are overwritten by the next call.
    """

    def __init__(
        self, objective: Objective, recipe: Recipe, steps: int, device: torch.device, *, cuda_graphs: bool = False
    ) -> None:
        self.objective, self.recipe, self.steps, self.device = objective, recipe, steps, device
        self.threat, self.step_size = recipe.threat, recipe.step_size
        self.optimizer = torch.optim.SGD(
            [parameter for parameter in objective.parameters() if parameter.requires_grad],
            recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
            fused=device.type not in ("mps", "meta"),
        )
        self.loss_scale = LossScale(self.optimizer, device) if recipe.precision == "fp16" else None
        self.attack: TrainingAttack = training_attack(recipe)
        self.epoch = 0
        self.perturb: Callable[..., Tensor] = self._perturb
        self.update: Callable[..., tuple[Tensor, Terms]] = self._update
        self.recorded: tuple[CudaGraphed, ...] = ()
        if cuda_graphs:
            self.recorded = self.perturb, self.update = CudaGraphed(self._perturb), CudaGraphed(self._update)
            self.lr = torch.zeros((), device=device)  # where the recorded update reads it

    def take(self, attack: TrainingAttack) -> None:
        """Make the adversarial images by another attack from now on."""
        self.attack = attack
        if self.recorded:
            self.recorded = self.perturb, self.update = CudaGraphed(self._perturb), CudaGraphed(self._update)

    def start_epoch(self, epoch: int) -> None:
        """Go by this epoch's number, from 0."""
        self.epoch, r = epoch, self.recipe
        if r.eps_ramp:
            share = (epoch + 1) / r.epochs
            self.threat = make_threat(r.norm, share * r.eps)
            self.step_size = None if r.step_size is None else share * r.step_size
        self.attack.start_epoch(epoch, r.epochs)
        for each in self.recorded:
            each.forget()

    def schedule(self, at: int) -> None:
        """Set rates, momenta and the parts' progress of step number `at`, counted over all epochs."""
        weight = self.recipe.batchnorm_momentum
        if weight is not None:
            # The first batch replaces the initial statistics, which a small weight would keep for hundreds of steps.
            set_norm_momentum(self.objective.nets["student"], weight if at else 1.0)
        self.objective.start_step(at / (self.recipe.epochs * self.steps))
        rate = learning_rate(self.recipe, at, self.steps)
        self.optimizer.param_groups[0].update(
            lr=self.lr.fill_(rate) if self.recorded else rate, momentum=momentum(self.recipe, at, self.steps)
        )

    def _perturb(self, x: Tensor, y: Tensor, second: Tensor | None, placement: Placement | None = None) -> Tensor:
        """Return the adversarial images of images x (N, C, H, W) with labels y (N,)."""
        batch = Batch(x, y, second, placement)
        with autocast(self.device, self.recipe.precision):
            return self.attack.perturb(self.objective, batch, self.threat, self.step_size, self.recipe.mode)

    def _update(
        self, x: Tensor, x_adv: Tensor, y: Tensor, second: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Terms]:
        """Make one step of the optimiser, the same on all ranks; return this rank's loss and its terms."""
        r = self.recipe
        if r.batchnorm_passes == "rice":
            self._show(x_adv, "adv")

        def terms_of(objective: Callable[..., Terms]) -> Terms:
            with autocast(self.device, r.precision):
                return objective(x, x_adv, y, second, rows)

        perturb, scale = r.awp > 0 and self.epoch >= r.awp_start, self.loss_scale
        climbed = partial(terms_of, self.objective.weights_terms)
        with adversarial_weights(self.objective, r.awp, climbed, scale) if perturb else nullcontext():
            terms = terms_of(self.objective)
            loss = total(terms)
            part = ranks.own_part(loss)
            (part if scale is None else scale.scaled(part)).backward()
            ranks.add_up_gradients(self.optimizer.param_groups[0]["params"])
            if r.batchnorm_passes in ("clean", "pang"):
                self._show(x, "clean")
            if r.clip_norm is not None:
                if scale is not None:
                    scale.unscale()
                torch.nn.utils.clip_grad_norm_(self.optimizer.param_groups[0]["params"], r.clip_norm)
            (self.optimizer if scale is None else scale).step()
        self.optimizer.zero_grad()
        self.attack.after_update(x, x_adv, self.threat)
        if r.batchnorm_passes in ("pang", "rice"):
            self._show(x, "clean")
        average_statistics(self.objective)
        self.objective.after_update()
        return loss, terms

    @torch.no_grad()
    def _show(self, x: Tensor, view: View) -> None:
        """Let the student's BatchNorm see images once more, as the authors' codes do to log what they give."""
        student = self.objective.nets["student"]
        with using_norms(student, view), autocast(self.device, self.recipe.precision):
            student(x)
