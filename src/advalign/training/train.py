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
from advalign.data import Dataset, describe, load, load_extra
from advalign.data.extra import find_npz
from advalign.errors import Busy, TrainingError, UserError, require
from advalign.objectives import Base, Method, as_method
from advalign.runs import Run, Weights, find_weights
from advalign.runs.trained_on import FILE, write_trained_on
from advalign.runtime.device import pick_device
from advalign.runtime.environment import environment
from advalign.runtime.files import present
from advalign.runtime.interrupts import Interrupts
from advalign.runtime.memory import require_memory
from advalign.runtime.progress import progress_bars, say
from advalign.runtime.seeds import seeded
from advalign.training.announcement import guest_lines
from advalign.training.display import Display
from advalign.training.graphs import check_captured
from advalign.training.loop import LogEntry, fit
from advalign.training.plan import Plan
from advalign.training.planning import plan
from advalign.training.recipes import Recipe
from advalign.training.sanity import judge, measure_guests, measure_start

Sinks = Callable[[Run], list[Callable[[LogEntry], None]]]


def train(
    method: str | Base | Method,
    *,
    data: str | Dataset,
    model: str,
    recipe: Recipe | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    guests: Mapping[str, str | Path] | None = None,
    allow_weak_guest: bool = False,
    init: str | Path | None = None,
    trust_model: bool = False,
    extra: str | Path | None = None,
    data_dir: str | Path | None = None,
    image_size: int = 32,
    device: str = "auto",
    time_budget: float | None = None,
    checkpoint_seconds: float = 120.0,
    cuda_graphs: bool = False,
    sinks: Sinks = lambda run: [],
    console: Console | None = None,
) -> Run:
    """Train a method, and first the guests that it needs and that you do not provide, each as a run of its own.

    A finished run is returned as it is, and an unfinished one resumes where it stopped. Guests are shared between runs.
    SIGTERM, Ctrl-C and the end of the time budget save the state and return; `run.finished` says whether the training
    is done.

    Example:
        >>> import advalign as aa
        >>> recipe = aa.Recipe(epochs=1, steps=1, subset=64, validation=16)
        >>> run = aa.train("at", data="digits", model="small-cnn(width=2)", recipe=recipe)

    Args:
        method: such as `trades(beta=6)+vfd(weight=0.02)`.
        data: a name, see `advalign.data.load`, or a data set.
        model: a name with arguments, `resnet18(width=16)`, or your own `package.module:function`.
        guests: run folders or weights files by the guest's name, `{"vanilla": "runs/..."}`; of a run, `best` is read.
            For weights from elsewhere, of another architecture than the student's, write `MODEL@FILE`.
            Each is measured on the validation images before it teaches.
        allow_weak_guest: whether a given guest may teach that is no better than always answering the largest class.
        init: a run folder or weights file of the student's architecture from which the student starts; of a run, `best`
            is read. Guests that are trained first do not start from it.
        trust_model: whether a function that a guest's file names as its architecture may be called.
        extra: an `.npz` file of generated images, of which each batch takes the recipe's `extra_share`, in the runs of
            guests as well; see `advalign.data.load_extra`.
        name: the run's folder below `runs`; if None, a name made of the method, the data, the model and a digest.
        time_budget: seconds for this call.
        cuda_graphs: record attack and update as CUDA graphs: the same kernels without the time to launch each.
        sinks: called once per run; returns functions that are called with each epoch's row of the log.

    Raises:
        UserError: anything that cannot work, before anything is written.
        TrainingError: a loss that is not finite, or one that has exploded with a student that is no better than always
            answering the largest class.
    """
    recipe, console, guests = recipe or Recipe(), console or Console(quiet=True), guests or {}
    method = as_method(method)
    require(checkpoint_seconds >= 0, lambda: f"checkpoint_seconds={checkpoint_seconds:g} must be at least 0")
    torch_device = _pick_device(device, recipe, cuda_graphs=cuda_graphs)
    models.canonical(model)  # data may take a download: what is cheap to refuse is refused before
    for source in filter(None, (*guests.values(), init)):
        find_weights(source)
    if extra is not None:
        find_npz(extra)
    dataset = load(data, directory=data_dir, image_size=image_size) if isinstance(data, str) else data
    for line in describe(dataset):
        say(console, line)
    extra_data = None if extra is None else load_extra(extra, dataset.shape, dataset.classes, dataset.name)
    planned = plan(
        method, dataset, model, recipe, runs=Path(runs), name=name, guests=guests, trust_model=trust_model,
        extra=extra_data, init=init,
    )  # fmt: skip
    if dataset.sources:
        used, validation = map(len, planned.images)
        held_out = "" if dataset.validation is not None else ", held out of train"
        say(console, f"  used: {used} images to train on, {validation} to select the best checkpoint{held_out}")
    for line in guest_lines(planned):
        say(console, line)
    unfinished = planned.in_order()
    for each in unfinished:
        each.run.require_space(each.space)
        what = f"attack={each.recipe.attack}, which keeps a perturbation for each image,"
        require_memory(each.remembered, torch_device, what, "choose another --attack, or a --subset")
    if planned in unfinished and not present(planned.run.state):
        given = [name for name, guest in planned.guests.items() if isinstance(guest, Weights)]
        measure_guests(planned, given, torch_device, console, allow_weak=allow_weak_guest)
        measure_start(planned, torch_device, console)
    if not unfinished:
        say(console, f"finished before: {planned.run.path}")
        if planned.run.warning:
            say(console, f"warning: {planned.run.path}: {planned.run.warning}")
    with Interrupts(time_budget) as interrupts, progress_bars(console, "steps") as bars:
        for each in unfinished:
            say(console, f"{each.method} on {dataset.name}, {each.model}: {each.run.path}")
            waits = None if each is planned else interrupts
            with _locked(each.run, waits, console) as locked, seeded(recipe.seed):
                finished = locked and (
                    each.run.finished
                    or _fit(each, torch_device, interrupts, checkpoint_seconds, cuda_graphs, sinks, bars)
                )
            if not finished:
                say(console, f"Stopped: {interrupts.reason}. Saved in {each.run.path}; the same command goes on.")
                break
    return planned.run


def _pick_device(name: str, recipe: Recipe, *, cuda_graphs: bool) -> torch.device:
    device = pick_device(name)
    if cuda_graphs:
        check_captured(recipe, device)
    return device


def _fit(
    planned: Plan,
    device: torch.device,
    interrupts: Interrupts,
    checkpoint_seconds: float,
    cuda_graphs: bool,
    sinks: Sinks,
    bars: Progress,
) -> bool:
    """Fit one planned run, and keep its status; return whether it is finished."""
    run = planned.run
    if not present(run.state):
        run.write_card("running", environment(), planned.about_data)
        trained = [name for name, guest in planned.guests.items() if isinstance(guest, Plan)]
        measure_guests(planned, trained, device, bars.console, allow_weak=True)
    if not (present(run.state) and (run.path / FILE).is_file()):  # the extra images may be many to read
        learned_from = [weights for weights in (planned.init, *planned.trained_guests.values()) if weights is not None]
        extra = [] if planned.extra is None else [planned.extra]
        write_trained_on(run, (*planned.images, *extra), learned_from)
    display = Display(bars, planned, sinks(run))
    finished = fit(
        planned,
        device,
        interrupts=interrupts,
        checkpoint_seconds=checkpoint_seconds,
        cuda_graphs=cuda_graphs,
        on_step=display.step,
        on_epoch=display.epoch,
        on_collapse=display.collapse,
    )
    if finished:
        _close(planned, bars.console)
    return finished


def _close(planned: Plan, console: Console) -> None:
    """Keep what the training has come to, and say it where it is doubtful.

    Raises:
        TrainingError: it has diverged; everything is kept.
    """
    run, outcome = planned.run, judge(planned)
    status = "diverged" if outcome.diverged else "finished"
    run.write_card(status, environment(), planned.about_data, outcome.warning)
    if outcome.diverged:
        raise TrainingError(f"{run.path}: {outcome.warning}")
    if outcome.warning:
        say(console, f"warning: {run.path}: {outcome.warning}")


@contextmanager
def _locked(run: Run, waits: Interrupts | None, console: Console) -> Iterator[bool]:
    """Hold the run's folder, so that no second process trains the same run; the system frees it at any death.

    Args:
        waits: where given, for a guest's run, wait for the other process until there is reason to stop; then yield
            False.

    Raises:
        Busy: another process holds the folder, and there is no waiting.
    """
    try:
        run.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {run.path}: {error.strerror}") from None
    lock, announced = FileLock(run.path / ".lock"), False
    while not lock.is_locked:
        try:
            lock.acquire(timeout=1 if announced else 0)
        except Timeout:
            if waits is None:
                raise Busy(f"{run.path} is being trained by another process; nothing was changed") from None
            if waits.reason:
                yield False
                return
            if not announced:
                say(console, f"waiting for the other process that trains {run.path}")
            announced = True
        except OSError as error:
            raise UserError(f"cannot lock {run.path / '.lock'}: {error.strerror}") from None
    try:
        run.remove_leftovers()
        yield True
    finally:
        lock.release()
