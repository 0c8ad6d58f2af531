"""The training loop: from batches to a trained student, resumable at any step with the same result to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from advalign.attacks import PGD
from advalign.data import Batches, Extra, Images
from advalign.data.batches import Epoch
from advalign.errors import TrainingError, UserError
from advalign.evaluation.accuracy import WORST_CASE, evaluate
from advalign.objectives import Objective
from advalign.objectives.contract import Calibration, Terms
from advalign.runs import Run
from advalign.runs.checkpoint import load_state, save_state, save_weights
from advalign.runtime.files import write_lines
from advalign.runtime.interrupts import Interrupts
from advalign.runtime.seeds import derive_seed
from advalign.training.averaging import Average
from advalign.training.recipes import Recipe
from advalign.training.step import Step

Row = dict[str, Any]


@dataclass
class TrainState:
    """Where a run stands: what `state.pt` holds beside the networks and the optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in the epoch under way
    seconds: float = 0.0
    best: list[float] = field(default_factory=list)  # validation accuracies of the best checkpoint: robust, clean
    log: list[Row] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the loss and its terms over the epoch, on the device
    calibration: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # of the epoch's first batch

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
    extra: Extra | None = None,
    card: dict[str, Any],
    interrupts: Interrupts,
    checkpoint_seconds: float,
    cuda_graphs: bool = False,
    on_step: Callable[[TrainState, int], None],
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
    batches = Batches(train, r.batch_size, augment=r.augment, seed=r.seed, extra=extra, extra_share=r.extra_share)
    step = Step(objective, r, batches.steps, device, cuda_graphs=cuda_graphs)
    average = Average(objective, r, batches.steps)
    train_state = _resume(run, objective, step.optimizer, average, device)
    if r.compile:
        objective.compile()
    compiling = None
    on_step(train_state, batches.steps)
    saved = time.monotonic()
    began = saved - train_state.seconds
    while train_state.epoch < r.epochs:
        epoch = train_state.epoch
        objective.train()
        if train_state.step == 0:
            objective.start_epoch(Epoch(batches, epoch), epoch / r.epochs)
        step.start_epoch(epoch)
        seconds = (
            batches.epoch(epoch, train_state.step, second=True) if objective.method.second else repeat((None, None))
        )
        for (x, y), (second, _) in zip(batches.epoch(epoch, train_state.step), seconds, strict=False):
            at = epoch * batches.steps + train_state.step
            torch.manual_seed(derive_seed(r.seed, epoch, train_state.step))
            step.schedule(at)
            x_adv = step.perturb(x, y, second)
            if train_state.step == 0:
                calibration = objective.calibrate(x, x_adv, y, second)
                train_state.calibration = {name: _floats(told) for name, told in calibration.items()}
            train_state.add(*step.update(x, x_adv, y, second))
            if r.compile and compiling is None:  # it happens within the process's first step
                compiling = time.monotonic() - saved
            average.update(at + 1)
            on_step(train_state, batches.steps)
            if interrupts.reason or time.monotonic() - saved > checkpoint_seconds:
                train_state.seconds = time.monotonic() - began
                _save(run, objective, step.optimizer, average, train_state)
                saved = time.monotonic()
            if interrupts.reason:
                return False
        row = _close_epoch(run, train_state, step.optimizer)
        with average.applied(Epoch(batches, epoch)) as student:
            if train_state.epoch % r.validate_every == 0 or train_state.epoch == r.epochs:
                row["validation"] = _validate(objective, student, validation, r)
            _keep(run, train_state, student, card, row)
        train_state.seconds = row["seconds"] = time.monotonic() - began
        if compiling is not None:
            row["compile_seconds"] = compiling
        write_lines(run.path / "log.jsonl", train_state.log)
        _save(run, objective, step.optimizer, average, train_state)
        saved = time.monotonic()
        on_epoch(row)
        if interrupts.reason and train_state.epoch < r.epochs:
            return False
    return True


def _validate(objective: Objective, student: nn.Module, validation: Images, recipe: Recipe) -> dict[str, float]:
    """Measure what the best checkpoint is selected by, first things first: robust accuracy, then clean."""
    if not objective.method.defends:
        return evaluate(student, validation).accuracies()
    attack = PGD(recipe.threat, steps=10)
    accuracies = evaluate(student, validation, [attack], precision=recipe.precision, seed=recipe.seed)
    return {"robust": accuracies.accuracies()[WORST_CASE], "clean": accuracies.accuracies()["clean"]}


def _keep(run: Run, train_state: TrainState, student: nn.Module, card: dict[str, Any], row: Row) -> None:
    """Save the student as `last`, and as `best` if it is the first of the highest validation accuracies."""
    as_of = {"epoch": row["epoch"], "validation": row.get("validation")}
    score = list(row.get("validation", {}).values())
    if score and (not train_state.best or score > train_state.best):
        train_state.best = score
        save_weights(run.weights("best"), student, {**card, "checkpoint": "best", **as_of})
    save_weights(run.weights("last"), student, {**card, "checkpoint": "last", **as_of})


def _close_epoch(run: Run, train_state: TrainState, optimizer: torch.optim.Optimizer) -> Row:
    """Turn the sums into the epoch's row of the log."""
    _require_finite(run, train_state)
    means = {name: float(value) / train_state.step for name, value in train_state.sums.items()}
    train_state.epoch, train_state.step, train_state.sums = train_state.epoch + 1, 0, {}
    lr = float(optimizer.param_groups[0]["lr"])
    row = {"epoch": train_state.epoch, "lr": lr, "loss": means.pop("loss"), "terms": means}
    if train_state.calibration:
        row["calibration"] = train_state.calibration
    train_state.log.append(row)
    return row


def _require_finite(run: Run, train_state: TrainState) -> None:
    loss = float(train_state.sums.get("loss", torch.zeros(())))
    if not math.isfinite(loss):
        kept = (
            f"the checkpoint of epoch {train_state.epoch} is kept" if train_state.log else "there was no checkpoint yet"
        )
        raise TrainingError(
            f"{run.path}: the loss became {loss} in epoch {train_state.epoch + 1}; {kept}. "
            "Try a lower --lr, a --warmup epoch, or --clip-norm 1"
        )


def _floats(calibration: Calibration) -> dict[str, dict[str, float]]:
    return {layer: {name: float(value) for name, value in told.items()} for layer, told in calibration.items()}


def _save(
    run: Run, objective: Objective, optimizer: torch.optim.Optimizer, average: Average, train_state: TrainState
) -> None:
    _require_finite(run, train_state)
    networks = {"objective": objective.learned_state(), "average": average.state()}
    save_state(run.state, {**networks, "optimizer": optimizer.state_dict(), **vars(train_state)})


def _resume(
    run: Run, objective: Objective, optimizer: torch.optim.Optimizer, average: Average, device: torch.device
) -> TrainState:
    if not run.state.exists():
        return TrainState()
    state = load_state(run.state)
    try:
        objective.load_state_dict({**objective.state_dict(), **state.pop("objective")})
        optimizer.load_state_dict(state.pop("optimizer"))
        average.load(state.pop("average"))
        state["sums"] = {name: value.to(device) for name, value in state["sums"].items()}
        return TrainState(**state)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{run.state} is no state of this run: {str(error).partition(chr(10))[0]}") from None
