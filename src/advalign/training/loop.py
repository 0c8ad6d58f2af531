"""The training loop: from a plan to a trained student, resumable at any step with the same result to the bit."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from advalign import attacks
from advalign.data import Images
from advalign.data.batches import Epoch, Placement
from advalign.data.stored import on_device
from advalign.errors import TrainingError, UserError, require
from advalign.evaluation.accuracy import WORST_CASE, evaluate
from advalign.models.synced_norm import synchronise_norms
from advalign.objectives import Objective
from advalign.objectives.contract import Calibration, Terms
from advalign.runs.checkpoint import convert_state, load_state, save_state, save_weights
from advalign.runs.formats import write_checked_lines
from advalign.runtime import ranks
from advalign.runtime.device import to_device
from advalign.runtime.files import digest, present
from advalign.runtime.interrupts import Interrupts
from advalign.runtime.sealed import Owner
from advalign.runtime.seeds import derive_seed
from advalign.training.attacks import PGD, training_attack
from advalign.training.averaging import Average
from advalign.training.guard import Collapse, Guard, Watch, is_guarded, remedies_for
from advalign.training.plan import Plan
from advalign.training.recipes import Recipe
from advalign.training.step import Step

LogEntry = dict[str, Any]

CALMER = "Try a lower --lr, a --warmup epoch, or --clip-norm 1"
"""What to do about a training that breaks down."""


@dataclass
class TrainState:
    """How far a training is: what `state.pt` holds beside the networks and the optimiser."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps finished in the epoch under way
    seconds: float = 0.0
    best: list[float] = field(default_factory=list)  # validation accuracies of the best checkpoint: robust, clean
    log: list[LogEntry] = field(default_factory=list)
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the loss and its terms over the epoch, on the device
    calibration: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # of the epoch's first batch
    watch: Watch = field(default_factory=Watch)

    def add(self, loss: Tensor, terms: Terms) -> None:
        """Count one step; nothing leaves the device."""
        values = {**{name: term.value for name, term in terms.items()}, "loss": loss}
        for name, value in ranks.batch_means(values).items():
            self.sums[name] = self.sums.get(name, 0) + value.float()
        self.step += 1


def fit(
    plan: Plan,
    device: torch.device,
    *,
    interrupts: Interrupts,
    checkpoint_seconds: float,
    cuda_graphs: bool = False,
    sync_norms: bool = False,
    on_step: Callable[[TrainState, int], None],
    on_epoch: Callable[[LogEntry], None],
    on_collapse: Callable[[Collapse], None],
) -> bool:
    """Train the plan's student from where its run stopped, if it did; return whether the run is finished.

    After an interruption, an epoch, or `checkpoint_seconds`, the state is saved; the best and last student are saved
    at the end of epochs, best by robust accuracy on the validation images (clean accuracy for natural training).

    Several ranks walk through this loop in step: each makes the adversarial images of its share of a batch, they add up
    their gradients (`Step.update`), and so they have the same student all the time. They agree on when to stop and to
    save, take turns in validating, and the first one writes.

    Args:
        sync_norms: whether BatchNorm sees the whole batch, and not each rank's share of it.
        on_step: called with the state and the number of steps in an epoch.
        on_epoch: called with the epoch's row of the log.
        on_collapse: called when the guard has gone back.

    Raises:
        TrainingError: the loss is not finite; the last good checkpoint is kept.
        UserError: the run's state is damaged, or the disk is full.
    """
    trainer = _Trainer(plan, device, cuda_graphs=cuda_graphs, sync_norms=sync_norms)
    steps, reported = trainer.batches.steps, trainer.state.epoch
    on_step(trainer.state, steps)
    while trainer.state.epoch < plan.recipe.epochs:
        trainer.start_epoch()
        for batch in trainer.remaining_batches():
            trainer.train_step(batch)
            if collapse := trainer.check():
                on_collapse(collapse)
                break
            on_step(trainer.state, steps)
            stop, due = ranks.agree(bool(interrupts.reason), time.monotonic() - trainer.saved > checkpoint_seconds)
            if stop or due:
                trainer.save()
            if stop:
                return False
        else:
            row = trainer.close_epoch()
            if row["epoch"] > reported:  # the guard may go back to an epoch's last step
                on_epoch(row)
                reported = row["epoch"]
            (stop,) = ranks.agree(bool(interrupts.reason))
            if stop and trainer.state.epoch < plan.recipe.epochs:
                return False
    trainer.forget_good_state()
    return True


class _Batch(NamedTuple):
    x: Tensor  # (N, C, H, W) in [0, 1]
    y: Tensor  # (N,)
    second: Tensor | None  # further augmentations of x, where the method reads them
    rows: Tensor | None  # numbers in the training set, where the method reads them
    placement: Placement | None  # where x was cut out, where the training attack reads it


@final
class _Trainer:
    """A plan's objective with its batches, optimiser, average and state.

    All randomness of a step comes from (seed, epoch, step), so that a resumed run needs no generator's state.
    """

    def __init__(self, plan: Plan, device: torch.device, *, cuda_graphs: bool, sync_norms: bool = False) -> None:
        self.run, self.recipe, self.card = plan.run, plan.recipe, plan.card
        self.objective = to_device(plan.objective(), device)
        self.ranks = {"ranks": ranks.world(), "sync_norms": sync_norms} if ranks.world() > 1 else {}
        if sync_norms and ranks.world() > 1:
            synchronise_norms(self.objective)
        _share_networks(self.objective)
        train, self.validation = (on_device(images, device) for images in plan.images)
        self.batches = plan.batches(train)
        ranks.take_share(self.batches.share)
        self.step = Step(self.objective, self.recipe, self.batches.steps, device, cuda_graphs=cuda_graphs)
        self.average = Average(self.objective, self.recipe, self.batches.steps)
        attack = self.step.attack
        watches = self.objective.method.defends and is_guarded(self.recipe, attack)
        remedies, steps = remedies_for(attack), self.batches.steps
        self.guard = Guard(self.recipe, remedies, steps, self.validation) if watches else None
        self.state = self._resume(self.run.state) or TrainState()
        self._arm()
        if self.recipe.compile:
            self.objective.compile()
        self.compile_seconds: float | None = None
        self.saved = time.monotonic()
        self.began = self.saved - self.state.seconds

    def start_epoch(self) -> None:
        """Begin the epoch, or go on within it after a stop."""
        epoch = self.state.epoch
        self.objective.train()
        if self.state.step == 0:
            self.objective.start_epoch(Epoch(self.batches, epoch), epoch / self.recipe.epochs)
        self.step.start_epoch(epoch)

    def remaining_batches(self) -> Iterator[_Batch]:
        """Yield the batches still to come in the epoch, each as often in a row as the training attack replays it."""
        replays, steps = self.step.attack.replays, self.batches.steps
        at, end = (self.state.epoch * steps + self.state.step, (self.state.epoch + 1) * steps)
        while at < end:  # counted over all epochs: a batch may be replayed across the end of one
            epoch, first = divmod(at // replays, steps)
            for number, batch in enumerate(self._batches(epoch, first), first):
                last = (epoch * steps + number + 1) * replays
                for _ in range(at, min(last, end)):
                    yield batch
                at = last
                if at >= end:
                    return

    def _batches(self, epoch: int, first: int) -> Iterator[_Batch]:
        """Yield the batches of an epoch from a number on, with what the method and the attack read beside them."""
        method = self.objective.method
        views = [self.batches.epoch(epoch, first, view=view) for view in range(1 + method.further)]
        rows = self.batches.rows(epoch, first) if method.reads_rows else repeat(None)
        placed = self.batches.placements(epoch, first) if self.step.attack.placed else repeat(None)
        for ((x, y), *further), its, placement in zip(zip(*views, strict=True), rows, placed, strict=False):
            yield _Batch(x, y, torch.cat([second for second, _ in further]) if further else None, its, placement)

    def train_step(self, batch: _Batch) -> None:
        """Make the adversarial images of a batch and update all that learns."""
        x, y, second, rows, placement = batch
        state = self.state
        count = state.epoch * self.batches.steps + state.step
        ranks.seed_step(derive_seed(self.recipe.seed, state.epoch, state.step))
        self.step.schedule(count)
        x_adv = self.step.perturb(x, y, second, placement)
        if state.step == 0:
            calibration = self.objective.calibrate(x, x_adv, y, second, rows)
            state.calibration = {name: _floats(values) for name, values in calibration.items()}
        state.add(*self.step.update(x, x_adv, y, second, rows))
        if self.recipe.compile and self.compile_seconds is None:  # it happens within the process's first step
            self.compile_seconds = time.monotonic() - self.saved
        self.average.update(count + 1)

    def check(self) -> Collapse | None:
        """Let the guard look at the student, if it is time: keep this state, or go back to the last one that is kept.

        Returns:
            What has happened, if the training has gone back.
        """
        state, steps, guard = self.state, self.batches.steps, self.guard
        tried = len(state.watch.collapses)
        if guard is None or not guard.due(state.step, steps) or tried == len(guard.remedies):
            return None
        self._require_finite()
        try:
            seen = guard.measure(self.objective.exported_student(), self.step.threat)
        except UserError as error:
            raise TrainingError(f"{self.run.path}: in epoch {state.epoch + 1}, {error}. {CALMER}") from error
        if not guard.collapsed(state.watch, seen):
            self._save_state(self.run.good_state)
            return None
        before = state.watch.highest
        self.state = self._resume(self.run.good_state) or state
        done = self.state.epoch + self.state.step / steps
        collapse = Collapse(state.epoch + state.step / steps, before, seen.robust, done, guard.remedies[tried])
        self.state.watch.collapses = [*state.watch.collapses, collapse]
        self._arm()
        self.save()
        return collapse

    def forget_good_state(self) -> None:
        """Remove what the guard has kept."""
        ranks.lead(lambda: self.run.good_state.unlink(missing_ok=True))

    def _arm(self) -> None:
        """Take the training attack that is due after what the guard has seen."""
        if collapses := self.state.watch.collapses:
            least, recipe = collapses[-1].steps, self.recipe
            steps = recipe.all_steps if isinstance(training_attack(recipe), PGD) else (least,)
            self.step.take(PGD(tuple(max(least, each) for each in steps), recipe.start))

    def close_epoch(self) -> LogEntry:
        """Log and validate the epoch, save the student and the state; return the epoch's row of the log."""
        state, epoch = self.state, self.state.epoch
        row = self._log_epoch()
        with self.average.applied(Epoch(self.batches, epoch)) as student:
            if state.epoch % self.recipe.validate_every == 0 or state.epoch == self.recipe.epochs:
                try:
                    row["validation"] = _validate(self.objective, student, self.validation, self.recipe)
                except UserError as error:  # the network was tried before: its weights have broken since
                    raise TrainingError(f"{self.run.path}: after epoch {state.epoch}, {error}. {CALMER}") from error
            self._save_student(student, row)
        state.seconds = row["seconds"] = time.monotonic() - self.began
        if self.compile_seconds is not None:
            row["compile_seconds"] = self.compile_seconds
        ranks.lead(lambda: write_checked_lines(self.run.path / "log.jsonl", state.log, self.run.id))
        self._save_state()
        return row

    def save(self) -> None:
        """Save the state within an epoch."""
        self.state.seconds = time.monotonic() - self.began
        self._save_state()

    def _log_epoch(self) -> LogEntry:
        """Turn the sums into the epoch's row of the log."""
        self._require_finite()
        state = self.state
        means = {name: float(value) / state.step for name, value in state.sums.items()}
        state.epoch, state.step, state.sums = state.epoch + 1, 0, {}
        lr = float(self.step.optimizer.param_groups[0]["lr"])
        row = {"epoch": state.epoch, "lr": lr, "loss": means.pop("loss"), "terms": means, **self.ranks}
        if state.calibration:
            row["calibration"] = state.calibration
        if self.step.loss_scale is not None:
            row["skipped_steps"] = self.step.loss_scale.take_skipped()
        if state.watch.accuracies:
            row["guard"], state.watch.accuracies = state.watch.accuracies, []
        if collapses := [asdict(each) for each in state.watch.collapses if math.ceil(each.back_to) == state.epoch]:
            row["collapses"] = collapses
        if self.recipe.eps_ramp:  # in the next epoch's larger radius, less is withstood
            state.watch.highest = 0.0
        state.log.append(row)
        return row

    def _save_student(self, student: nn.Module, row: LogEntry) -> None:
        """Save the student as `last`, and as `best` if it is the first of the highest validation accuracies."""
        as_of = {"epoch": row["epoch"], "validation": row.get("validation")}
        score = list(row.get("validation", {}).values())
        if score and (not self.state.best or score > self.state.best):
            self.state.best = score
            self._save_weights("best", student, as_of)
        self._save_weights("last", student, as_of)

    def _save_weights(self, checkpoint: str, student: nn.Module, as_of: dict[str, Any]) -> None:
        card = {**self.card, "checkpoint": checkpoint, **as_of}
        ranks.lead(lambda: save_weights(self.run.weights(checkpoint), student, card))

    def _save_state(self, path: Path | None = None) -> None:
        """Save where the training is, in `state.pt` or elsewhere; of attacks and guards what they remember."""
        self._require_finite()
        networks = {"objective": self.objective.learned_state(), "average": self.average.state()}
        content = {**networks, "optimizer": self.step.optimizer.state_dict(), **vars(self.state)}
        del content["watch"]
        if self.guard is not None:
            content["watch"] = asdict(self.state.watch)
        if remembered := self.step.attack.state():
            content["attack"] = remembered
        if self.step.loss_scale is not None:
            content["loss_scale"] = self.step.loss_scale.state()
        ranks.lead(lambda: save_state(path or self.run.state, content, self._owner))
        if path is None:
            self.saved = time.monotonic()

    def _resume(self, path: Path) -> TrainState | None:
        """Take over what was saved, as the first rank finds it; return how far the training was, or None."""
        device = self.step.device
        good = Owner(self.run.id, "remove it, and the training goes on from where it is, with a stronger attack")
        owner = self._owner if path == self.run.state else good
        state = ranks.lead(lambda: load_state(path, owner=owner) if present(path) else None)
        if state is None:
            return None
        try:
            self.step.attack.load(state.pop("attack", {}), device)
            self.objective.load_state_dict({**self.objective.state_dict(), **state.pop("objective")})
            _load_optimizer(self.step.optimizer, state.pop("optimizer"))
            self.average.load(state.pop("average"))
            if self.step.loss_scale is not None:
                self.step.loss_scale.load(state.pop("loss_scale"))
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no state of this run: {str(error).partition(chr(10))[0]}") from None
        train_state = convert_state(state, TrainState, path)
        within = 0 <= train_state.epoch <= self.recipe.epochs and 0 <= train_state.step <= self.batches.steps
        summed = not train_state.step or "loss" in train_state.sums
        summed = summed and all(value.shape == () for value in train_state.sums.values())
        require(
            within and summed and len(train_state.log) == train_state.epoch,
            lambda: f"{path} is no state of this run: its epoch, step, log and sums contradict each other",
        )
        train_state.sums = {name: value.to(device) for name, value in train_state.sums.items()}
        return train_state

    @property
    def _owner(self) -> Owner:
        return Owner(self.run.id, "remove it, and the training starts again")

    def _require_finite(self) -> None:
        state = self.state
        loss = float(state.sums.get("loss", torch.zeros(())))
        if not math.isfinite(loss):
            kept = f"the checkpoint of epoch {state.epoch} is kept" if state.log else "there was no checkpoint yet"
            raise TrainingError(f"{self.run.path}: the loss became {loss} in epoch {state.epoch + 1}; {kept}. {CALMER}")


def _share_networks(objective: Objective) -> None:
    """Give every rank the networks of the first one: a model may draw its weights from what nobody seeds.

    Raises:
        UserError: the ranks have built different networks.
    """
    if ranks.world() > 1:
        tensors = dict([*objective.named_parameters(), *objective.named_buffers()])
        shapes = digest(*(f"{name} {tuple(each.shape)} {each.dtype};" for name, each in tensors.items()))
        ranks.require_alike(networks_of=f"{sum(each.numel() for each in tensors.values())} numbers ({shapes})")
        ranks.copy_first(tensors.values())


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Take over the buffers, and the learning rate and momentum of the last step; the recipe tells the other options.

    Raises:
        KeyError, ValueError: it is the state of another optimiser; torch would notice in the next step.
    """
    own = optimizer.state_dict()["param_groups"]
    last = [{name: float(group[name]) for name in ("lr", "momentum")} for group in saved["param_groups"]]
    groups = [{**group, **values} for group, values in zip(own, last, strict=True)]
    optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
    for parameter, buffers in optimizer.state.items():
        shapes = {name: getattr(buffer, "shape", None) for name, buffer in buffers.items()}
        if shapes != {"momentum_buffer": parameter.shape}:
            raise ValueError("its optimiser is another")


def _validate(objective: Objective, student: nn.Module, validation: Images, recipe: Recipe) -> dict[str, float]:
    """Measure what selects the best checkpoint, in the order of its weight: robust accuracy, then clean."""
    if not objective.method.defends:
        return evaluate(student, validation).accuracies()
    attack = attacks.PGD(recipe.threat, steps=10)
    accuracies = evaluate(student, validation, [attack], precision=recipe.precision, seed=recipe.seed).accuracies()
    return {"robust": accuracies[WORST_CASE], "clean": accuracies["clean"]}


def _floats(calibration: Calibration) -> dict[str, dict[str, float]]:
    return {layer: {name: float(value) for name, value in values.items()} for layer, values in calibration.items()}
