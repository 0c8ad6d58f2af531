"""Averages of the student's weights over the steps of a training: what is validated and saved in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor, nn

from advalign.data.batches import Epoch
from advalign.models.modes import buffers_kept
from advalign.models.norm_statistics import estimate_norm_statistics
from advalign.models.split_norm import SplitNorm
from advalign.objectives import Objective
from advalign.runtime import ranks
from advalign.runtime.seeds import derive_seed
from advalign.training.recipes import Recipe

ADVERSARIAL_BATCHES = 50


@final
class Average:
    """An exponential (EMA, Gowal et al. 2020) or equal (SWA, Izmailov et al. 2018) average of the student's parameters.

    The EMA's decay is min(decay, (1 + t) / (10 + t)), over epochs the decay itself (Cui et al. 2024), as it is over the
    steps if the recipe says so. It takes BatchNorm's statistics from the student, and begins with its weights. The
    SWA's statistics are estimated anew, by one pass over the epoch's clean batches (Chen et al. 2021); where clean and
    adversarial images have norms of their own, so that the adversarial ones are evaluated, by 50 adversarial batches
    against the average itself (AR-AT). `method` is the average that the method itself keeps, as it is.
    """

    def __init__(self, objective: Objective, recipe: Recipe, steps: int) -> None:
        self.objective, self.recipe = objective, recipe
        start = recipe.average_start
        share = (0.5 if recipe.average == "swa" else 0.0) if start is None else start
        self.first = round(share * recipe.epochs) * steps
        self.every = {"swa": recipe.swa_every or steps, "ema": steps if recipe.ema_epochs else 1}.get(recipe.average, 1)
        self.count = 0
        averages = recipe.average in ("ema", "swa")
        self.weights = [p.detach().clone() for p in objective.student.parameters()] if averages else []

    def update(self, done: int) -> None:
        """Take the student in after `done` steps of the whole training, where it is due."""
        if not self.weights:
            return
        if done == self.first:
            for mine, parameter in zip(self.weights, self.objective.student.parameters(), strict=True):
                mine.copy_(parameter.detach())
        if done <= self.first or (done - self.first) % self.every:
            return
        torch._foreach_lerp_(self.weights, [p.detach() for p in self.objective.student.parameters()], self._share())
        self.count += 1

    def _share(self) -> float:
        """Return how much of the average the student's weights become."""
        t, decay = self.count, self.recipe.ema_decay
        if self.recipe.average == "swa":
            return 1 / (t + 1)
        if self.recipe.ema_epochs:
            return 1 - decay if t else 1.0
        if self.recipe.ema_constant:
            return 1 - decay
        return 1 - min(decay, (1 + t) / (10 + t))

    @contextmanager
    def applied(self, epoch: Epoch) -> Iterator[nn.Module]:
        """Put the average, once there is one, in the student's place, and the student back afterwards, to the bit.

        Yields:
            The student as a plain network.
        """
        student = self.objective.student
        if self.recipe.average == "method":
            yield self.objective.exported_student(self.objective.average)
            return
        if not self.count:
            yield self.objective.exported_student()
            return
        live = [p.detach().clone() for p in student.parameters()]
        with buffers_kept(student):
            _copy(self.weights, student)
            try:
                if self.recipe.average == "swa":
                    self._estimate_statistics(epoch)
                yield self.objective.exported_student()
            finally:
                _copy(live, student)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"count": self.count, "weights": self.weights}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state.

        Raises:
            KeyError, TypeError, ValueError: it is none of this average.
        """
        if type(state["count"]) is not int or state["count"] < 0:
            raise ValueError("its average has no count")
        shapes = [getattr(saved, "shape", None) for saved in state["weights"]]
        if shapes != [mine.shape for mine in self.weights]:
            raise ValueError("its average is of another network")
        self.count = state["count"]
        for mine, saved in zip(self.weights, state["weights"], strict=True):
            mine.copy_(saved)

    @torch.no_grad()
    def _estimate_statistics(self, epoch: Epoch) -> None:
        student = self.objective.student
        adversarial = any(isinstance(module, SplitNorm) for module in student.modules())
        batches = epoch if not adversarial else list(islice(self._attacked(epoch), ADVERSARIAL_BATCHES))
        modes = [(module, module.training) for module in student.modules()]
        student.train()
        estimate_norm_statistics(student, (x for x, _ in batches))
        for module, training in modes:
            module.training = training

    def _attacked(self, epoch: Epoch) -> Iterator[tuple[Tensor, Tensor]]:
        r = self.recipe
        for step, (x, y) in enumerate(epoch):
            ranks.seed_step(derive_seed(r.seed, epoch.epoch, step, "statistics"))
            threat = r.threat
            # In train mode: the statistics that eval mode would use are those of other weights.
            x_adv = self.objective.perturb(
                x, y, threat, second=x, steps=r.all_steps[-1], step_size=r.step_size, start=r.start, mode="train"
            )
            yield x_adv, y


@torch.no_grad()
def _copy(weights: list[Tensor], net: nn.Module) -> None:
    for parameter, weight in zip(net.parameters(), weights, strict=True):
        parameter.copy_(weight)
