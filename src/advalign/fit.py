"""The training loop: from batches to a trained student, resumable at any step with the same result to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advalign.attacks import PGD
from advalign.data import Batches, Images
from advalign.errors import TrainingError, UserError
from advalign.evaluation import WORST_CASE, evaluate
from advalign.interrupts import Interrupts
from advalign.objectives import Objective, total
from advalign.objectives.parts import Terms
from advalign.recipes import Recipe
from advalign.runs import Run
from advalign.runs.checkpoint import load_state, save_state, save_weights
from advalign.runs.files import write_lines
from advalign.runtime import autocast, mixed_seed
from advalign.schedule import learning_rate, momentum
from advalign.threats import threat

Row = dict[str, Any]


@dataclass
class Standing:
    """Where a run stands: what `state.pt` holds beside the networks and the optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in the epoch under way
    seconds: float = 0.0
    best: list[float] = field(default_factory=list)  # validation accuracies of the best checkpoint: robust, clean
    log: list[Row] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the loss and its terms over the epoch, on the device

    def add(self, loss: Tensor, terms: Terms) -> None:
        """Count one step; nothing leaves the device."""
        for name, value in {**{name: term.value for name, term in terms.items()}, "loss": loss}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.step += 1


def fit(
    run: Run,
    objective: Objective,
    train: Images,
    validation: Images,
    recipe: Recipe,
    *,
    card: dict[str, Any],
    interrupts: Interrupts,
    checkpoint_seconds: float,
    on_step: Callable[[Standing, int], None],
    on_epoch: Callable[[Row], None],
) -> bool:
    """Train the objective's student from wherever the run stands; return whether it is finished.

    All randomness of a step comes from (seed, epoch, step), so a resumed run needs no generator's state. After an
    interruption, an epoch, or `checkpoint_seconds`, the state is saved; the best and last student are saved at the
    end of epochs, best by robust accuracy on the validation images (clean accuracy for natural training).

    Raises:
        TrainingError: the loss is not finite; the last good checkpoint is kept.
        UserError: the run's state is damaged, or the disk is full.
    """
    r = recipe
    device = train.labels.device
    batches = Batches(train, r.batch_size, augment=r.augment, seed=r.seed)
    learning = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        learning,
        r.lr,
        momentum=r.momentum,
        weight_decay=r.weight_decay,
        nesterov=r.nesterov,
        fused=device.type != "mps",
    )
    standing = _resume(run, objective, optimizer, device)
    budget = threat(r.norm, r.eps)
    if r.compile:
        objective.compile()
    on_step(standing, batches.steps)
    saved = time.monotonic()
    began = saved - standing.seconds
    while standing.epoch < r.epochs:
        epoch = standing.epoch
        objective.train()
        for x, y in batches.epoch(epoch, start=standing.step):
            at = epoch * batches.steps + standing.step
            torch.manual_seed(mixed_seed(r.seed, epoch, standing.step))
            optimizer.param_groups[0].update(
                lr=learning_rate(r, at, batches.steps), momentum=momentum(r, at, batches.steps)
            )
            with autocast(device, r.precision):
                x_adv = objective.perturb(
                    x, y, budget, steps=r.steps, step_size=r.step_size, start=r.start, mode=r.mode
                )
                terms = objective(x, x_adv, y)
            loss = total(terms)
            loss.backward()
            if r.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(learning, r.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            standing.add(loss, terms)
            on_step(standing, batches.steps)
            if interrupts.reason or time.monotonic() - saved > checkpoint_seconds:
                standing.seconds = time.monotonic() - began
                _save(run, objective, optimizer, standing)
                saved = time.monotonic()
            if interrupts.reason:
                return False
        row = _close_epoch(run, standing, optimizer)
        if standing.epoch % r.validate_every == 0 or standing.epoch == r.epochs:
            row["validation"] = _validate(objective, validation, r)
            score = list(row["validation"].values())
            if not standing.best or score > standing.best:
                standing.best = score
                save_weights(run.weights("best"), objective.student, {**card, "checkpoint": "best", **_as_of(row)})
        standing.seconds = row["seconds"] = time.monotonic() - began
        save_weights(run.weights("last"), objective.student, {**card, "checkpoint": "last", **_as_of(row)})
        write_lines(run.path / "log.jsonl", standing.log)
        _save(run, objective, optimizer, standing)
        saved = time.monotonic()
        on_epoch(row)
        if interrupts.reason and standing.epoch < r.epochs:
            return False
    return True


def _validate(objective: Objective, validation: Images, recipe: Recipe) -> dict[str, float]:
    """Measure what the best checkpoint is selected by, first things first: robust accuracy, then clean."""
    if objective.method.base.craft is None:
        return evaluate(objective.student, validation).accuracies()
    attack = PGD(threat(recipe.norm, recipe.eps), steps=10)
    accuracies = evaluate(objective.student, validation, [attack], precision=recipe.precision, seed=recipe.seed)
    return {"robust": accuracies.accuracies()[WORST_CASE], "clean": accuracies.accuracies()["clean"]}


def _close_epoch(run: Run, standing: Standing, optimizer: torch.optim.Optimizer) -> Row:
    """Turn the sums into the epoch's row of the log."""
    _require_finite(run, standing)
    means = {name: float(value) / standing.step for name, value in standing.sums.items()}
    standing.epoch, standing.step, standing.sums = standing.epoch + 1, 0, {}
    row = {"epoch": standing.epoch, "lr": optimizer.param_groups[0]["lr"], "loss": means.pop("loss"), "terms": means}
    standing.log.append(row)
    return row


def _as_of(row: Row) -> Row:
    return {"epoch": row["epoch"], "validation": row.get("validation")}


def _require_finite(run: Run, standing: Standing) -> None:
    loss = float(standing.sums.get("loss", torch.zeros(())))
    if not math.isfinite(loss):
        kept = f"the checkpoint of epoch {standing.epoch} is kept" if standing.log else "there was no checkpoint yet"
        raise TrainingError(
            f"{run.path}: the loss became {loss} in epoch {standing.epoch + 1}; {kept}. "
            "Try a lower --lr, a --warmup epoch, or --clip-norm 1"
        )


def _save(run: Run, objective: Objective, optimizer: torch.optim.Optimizer, standing: Standing) -> None:
    _require_finite(run, standing)
    state = {"objective": objective.learned_state(), "optimizer": optimizer.state_dict(), **vars(standing)}
    save_state(run.state, state)


def _resume(run: Run, objective: Objective, optimizer: torch.optim.Optimizer, device: torch.device) -> Standing:
    if not run.state.exists():
        return Standing()
    state = load_state(run.state)
    try:
        objective.load_state_dict({**objective.state_dict(), **state.pop("objective")})
        optimizer.load_state_dict(state.pop("optimizer"))
        state["sums"] = {name: value.to(device) for name, value in state["sums"].items()}
        return Standing(**state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{run.state} is no state of this run: {str(error).partition(chr(10))[0]}") from None
