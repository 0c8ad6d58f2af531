"""Training as a verb: fit a run, and first the guests it needs, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from advalign import models
from advalign.data import Dataset, load, load_extra
from advalign.data.extra import find_npz
from advalign.errors import Busy, UserError, require
from advalign.objectives import Base, Method, as_method
from advalign.runs import Run, find_weights
from advalign.runtime.device import pick_device, to_device
from advalign.runtime.environment import environment
from advalign.runtime.interrupts import Interrupts
from advalign.runtime.progress import progress_bars, say
from advalign.runtime.seeds import seeded
from advalign.training.loop import Row, TrainState, fit
from advalign.training.plan import Plan, plan
from advalign.training.recipes import Recipe

_SHOWN = {"clean": "validation: clean", "robust": "PGD-10"}


def train(
    method: str | Base | Method,
    *,
    data: str | Dataset,
    model: str,
    recipe: Recipe | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    guests: Mapping[str, str | Path] | None = None,
    trust_model: bool = False,
    extra: str | Path | None = None,
    data_dir: str | Path | None = None,
    image_size: int = 32,
    device: str = "auto",
    time_budget: float | None = None,
    checkpoint_seconds: float = 120.0,
    cuda_graphs: bool = False,
    sinks: Callable[[Run], list[Callable[[Row], None]]] = lambda run: [],
    console: Console | None = None,
) -> Run:
    """Train a method, and first the guests that it needs and that are not given, each as a run of its own.

    A run that is finished is returned as it is, an unfinished one goes on where it stopped, and guests are shared
    between runs. SIGTERM, Ctrl-C and the time budget save the state and return; `run.finished` tells.

    Args:
        method: such as `trades(beta=6)+vfd(weight=0.02)`.
        data: a name, see `advalign.data.load`, or a data set.
        model: a name with arguments, `resnet18(width=16)`, or `package.module:function` of your own.
        guests: run folders or weights files by the guest's name, `{"vanilla": "runs/..."}`; the run's `best` is taken.
            Weights from elsewhere, of another architecture than the student's, are given as `MODEL@FILE`.
        trust_model: whether a function that a guest's file names as its architecture may be called.
        extra: an `.npz` file of generated images, of which each batch takes the recipe's `extra_share`, in the runs of
            guests as well; see `advalign.data.load_extra`.
        name: the run's folder below `runs`; named by its content if not given.
        time_budget: seconds for this call.
        cuda_graphs: record attack and update as CUDA graphs: the same kernels without the time to launch each.
        sinks: called once per run; what it returns is called with each epoch's row of the log.

    Raises:
        UserError: anything that cannot work, before anything is written.
        TrainingError: a loss that is not finite.
    """
    method, recipe, console = as_method(method), recipe or Recipe(), console or Console(quiet=True)
    require(checkpoint_seconds >= 0, lambda: f"checkpoint_seconds={checkpoint_seconds:g} must be at least 0")
    where = pick_device(device)
    require(not cuda_graphs or where.type == "cuda", lambda: f"CUDA graphs need a CUDA device, not {where.type!r}")
    swings = recipe.cycle_momentum or recipe.compile
    require(not cuda_graphs or not swings, "CUDA graphs go with neither --cycle-momentum nor --compile")
    models.canonical(model)  # data may take a download: what is cheap to refuse is refused before
    for source in (guests or {}).values():
        find_weights(source)
    if extra is not None:
        find_npz(extra)
    dataset = load(data, directory=data_dir, image_size=image_size) if isinstance(data, str) else data
    more = None if extra is None else load_extra(extra, dataset.shape, dataset.classes, dataset.name)
    planned = plan(
        method, dataset, model, recipe, runs=Path(runs), name=name, given=guests or {}, trust_model=trust_model,
        extra=more,
    )  # fmt: skip
    todo = planned.in_order()
    for each in todo:
        each.run.require_space(each.space)
    if dataset.note:
        say(console, f"{dataset.name}: {dataset.note}")
    if not todo:
        say(console, f"finished before: {planned.run.path}")
    with Interrupts(time_budget) as interrupts, progress_bars(console, "steps") as bars:
        for each in todo:
            say(console, f"{each.method} on {dataset.name}, {each.model}: {each.run.path}")
            waits = None if each is planned else interrupts
            with _only_here(each.run, waits, console) as here, seeded(recipe.seed):
                finished = here and (
                    each.run.finished or _fit(each, where, interrupts, checkpoint_seconds, cuda_graphs, sinks, bars)
                )
            if not finished:
                say(console, f"Stopped: {interrupts.reason}. Saved in {each.run.path}; the same command goes on.")
                break
    return planned.run


def _fit(
    each: Plan,
    device: torch.device,
    interrupts: Interrupts,
    checkpoint_seconds: float,
    cuda_graphs: bool,
    sinks: Callable[[Run], list[Callable[[Row], None]]],
    bars: Progress,
) -> bool:
    """Fit one planned run; return whether it is finished."""
    objective = to_device(each.bind(), device)
    train_images, validation = (part.to(device) for part in each.images)
    if not each.run.state.exists():
        each.run.write_card("running", environment())
    show = _Show(bars, each, sinks(each.run))
    finished = fit(
        each.run,
        objective,
        train_images,
        validation,
        each.recipe,
        extra=each.extra,
        card=each.card,
        interrupts=interrupts,
        checkpoint_seconds=checkpoint_seconds,
        cuda_graphs=cuda_graphs,
        on_step=show.step,
        on_epoch=show.epoch,
    )
    if finished:
        each.run.write_card("finished", environment())
    return finished


@contextmanager
def _only_here(run: Run, waits: Interrupts | None, console: Console) -> Iterator[bool]:
    """Hold the run's folder, so that no second process trains the same run; the system frees it at any death.

    Another run's guest is waited for, since it will be there when its process is done: until there is reason to stop,
    which gives False.

    Raises:
        Busy: another process holds it, and there is no waiting.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {run.path}: {error.strerror}") from None
    lock, told = FileLock(run.path / ".lock"), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1 if told else 0)
        except Timeout:
            if waits is None:
                raise Busy(f"{run.path} is being trained by another process; nothing was changed") from None
            if waits.reason:
                yield False
                return
            if not told:
                say(console, f"waiting for the other process that trains {run.path}")
            told = True
    try:
        run.remove_leftovers()
        yield True
    finally:
        lock.release()


class _Show:
    """A run's bar and lines, and whoever else listens to its log."""

    def __init__(self, bars: Progress, each: Plan, listeners: list[Callable[[Row], None]]) -> None:
        self.bars, self.epochs, self.listeners = bars, each.recipe.epochs, listeners
        self.task = bars.add_task(str(each.method), total=None)

    def step(self, train_state: TrainState, steps: int) -> None:
        done = train_state.epoch * steps + train_state.step
        self.bars.update(self.task, total=self.epochs * steps, completed=done)

    def epoch(self, row: Row) -> None:
        validation = row.get("validation", {})
        accuracies = [f"{label} {validation[key]:.2%}" for key, label in _SHOWN.items() if key in validation]
        shown = [f"epoch {row['epoch']:>3}/{self.epochs}", f"loss {row['loss']:.4f}", *accuracies]
        say(self.bars.console, "  ".join([*shown, f"lr {row['lr']:.4f}", f"{row['seconds']:.0f} s"]))
        for listen in self.listeners:
            listen(row)
