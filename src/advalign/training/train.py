"""Training as a verb: fit a run, and first the guests it needs, one after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import Progress

from advalign import models
from advalign.data import Dataset, describe, load, load_extra
from advalign.data.extra import find_npz
from advalign.errors import Busy, TrainingError, UserError, require
from advalign.models.synced_norm import synchronise_norms
from advalign.objectives import Base, Method, as_method
from advalign.runs import Run, Weights, find_weights
from advalign.runs.trained_on import FILE, write_trained_on
from advalign.runtime import ranks
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
    sync_bn: bool = False,
    sinks: Sinks = lambda run: [],
    console: Console | None = None,
) -> Run:
    """Train a method, and first the guests that it needs and that you do not provide, each as a run of its own.

    A finished run is returned as it is, and an unfinished one resumes where it stopped. Guests are shared between runs.
    SIGTERM, Ctrl-C and the end of the time budget save the state and return; `run.finished` says whether the training
    is done.

    Processes that torchrun has started train one run together, each on a device of its own and on its share of every
    batch; all of them call this, with the same arguments.

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
        sync_bn: let BatchNorm see the whole batch where several processes share it, and not each its own images.
        sinks: called once per run; returns functions that are called with each epoch's row of the log.

    Raises:
        UserError: anything that cannot work, before anything is written.
        TrainingError: a loss that is not finite, or one that has exploded with a student that is no better than always
            answering the largest class.
    """
    recipe, console, guests = recipe or Recipe(), console or Console(quiet=True), guests or {}
    require(checkpoint_seconds >= 0, lambda: f"checkpoint_seconds={checkpoint_seconds:g} must be at least 0")
    with ranks.joined(device) as own_device:
        if ranks.rank() > 0:
            console = Console(quiet=True)
        torch_device = _pick_device(own_device, recipe, cuda_graphs=cuda_graphs)

        def prepare() -> Plan:
            models.canonical(model)  # data may take a download: what is cheap to refuse is refused before
            chosen = as_method(method)
            for source in filter(None, (*guests.values(), init)):
                find_weights(source)
            if extra is not None:
                find_npz(extra)
            dataset = load(data, directory=data_dir, image_size=image_size) if isinstance(data, str) else data
            for line in describe(dataset):
                say(console, line)
            extra_data = None if extra is None else load_extra(extra, dataset.shape, dataset.classes, dataset.name)
            planned = plan(
                chosen, dataset, model, recipe, runs=Path(runs), name=name, guests=guests,
                trust_model=trust_model, extra=extra_data, init=init,
            )  # fmt: skip
            _announce(planned, console)
            return planned

        planned = ranks.first_ahead(prepare)
        ranks.require_alike(run=f"{planned.run.path} ({planned.run.id})", sync_bn=sync_bn)
        unfinished = _unfinished(planned, sync_bn=sync_bn)
        if ranks.world() > 1 and unfinished:
            say(console, _line_on_ranks(planned, sync_bn=sync_bn))
        ranks.lead(lambda: _measure_given(planned, unfinished, torch_device, console, allow_weak=allow_weak_guest))
        with Interrupts(time_budget) as interrupts, progress_bars(console, "steps") as bars:
            for each in unfinished:
                say(console, f"{each.method} on {each.dataset.name}, {each.model}: {each.run.path}")
                waits = None if each is planned else interrupts
                with _locked(each.run, waits, console) as locked, seeded(recipe.seed):
                    finished = locked and (
                        ranks.lead(lambda: each.run.finished)
                        or _fit(each, torch_device, interrupts, checkpoint_seconds, cuda_graphs, sync_bn, sinks, bars)
                    )
                if not finished:
                    reason = interrupts.reason or "another rank was asked to stop"
                    say(console, f"Stopped: {reason}. Saved in {each.run.path}; the same command goes on.")
                    break
        return planned.run


def _announce(planned: Plan, console: Console) -> None:
    """Say which images are used, and what guests there will be."""
    dataset = planned.dataset
    if dataset.sources:
        used, validation = map(len, planned.images)
        held_out = "" if dataset.validation is not None else ", held out of train"
        say(console, f"  used: {used} images to train on, {validation} to select the best checkpoint{held_out}")
    for line in guest_lines(planned):
        say(console, line)


def _unfinished(planned: Plan, *, sync_bn: bool) -> list[Plan]:
    """Return what is to be trained, in order, as the first rank finds it: other programs may finish runs meanwhile.

    Raises:
        UserError: a batch that leaves no image to some rank, or a BatchNorm that cannot be shown a whole batch.
    """
    unfinished = ranks.lead(lambda: [each.run.id for each in planned.in_order()])
    found = [each for each in planned.with_guests() if each.run.id in unfinished]
    for each in found:
        each.batches(each.images[0])
        if sync_bn and ranks.world() > 1:
            synchronise_norms(each.untrained_objective())
    return found


def _line_on_ranks(planned: Plan, *, sync_bn: bool) -> str:
    """Say how many ranks share a batch, and what BatchNorm sees of it."""
    norms = "all of them" if sync_bn else "the images of its own rank alone; --sync-bn shows it all"
    size = min(planned.recipe.batch_size, len(planned.images[0]))
    return f"{ranks.world()} ranks share the {size} images of a batch; in training, BatchNorm sees {norms}"


def _measure_given(
    planned: Plan, unfinished: list[Plan], device: torch.device, console: Console, *, allow_weak: bool
) -> None:
    """Measure what a new run learns or starts from, see that the disk has room, and say what is finished."""
    for each in unfinished:
        each.run.require_space(each.space)
        what = f"attack={each.recipe.attack}, which keeps a perturbation for each image,"
        require_memory(each.remembered, device, what, "choose another --attack, or a --subset")
    if planned in unfinished and not present(planned.run.state):
        given = [name for name, guest in planned.guests.items() if isinstance(guest, Weights)]
        measure_guests(planned, given, device, console, allow_weak=allow_weak)
        measure_start(planned, device, console)
    if not unfinished:
        say(console, f"finished before: {planned.run.path}")
        if planned.run.warning:
            say(console, f"warning: {planned.run.path}: {planned.run.warning}")


def _pick_device(name: str, recipe: Recipe, *, cuda_graphs: bool) -> torch.device:
    device = pick_device(name)
    several = ranks.world() > 1
    require(not (cuda_graphs and several), "CUDA graphs hold no exchange between processes: leave out --cuda-graphs")
    require(not (recipe.compile and several), "a compiled step holds no exchange of processes: leave out --compile")
    if cuda_graphs:
        check_captured(recipe, device)
    return device


def _fit(
    planned: Plan,
    device: torch.device,
    interrupts: Interrupts,
    checkpoint_seconds: float,
    cuda_graphs: bool,
    sync_bn: bool,
    sinks: Sinks,
    bars: Progress,
) -> bool:
    """Fit one planned run, and keep its status; return whether it is finished."""
    first = ranks.rank() == 0
    ranks.lead(lambda: _open(planned, device, bars.console))
    with ranks.together():
        display = Display(bars, planned, sinks(planned.run) if first else [])
    finished = fit(
        planned,
        device,
        interrupts=interrupts,
        checkpoint_seconds=checkpoint_seconds,
        cuda_graphs=cuda_graphs,
        sync_norms=sync_bn,
        on_step=display.step,
        on_epoch=display.epoch,
        on_collapse=display.collapse,
    )
    if finished:
        ranks.lead(lambda: _close(planned, bars.console))
    return finished


def _open(planned: Plan, device: torch.device, console: Console) -> None:
    """Write what the training begins with, unless it goes on."""
    run = planned.run
    if not present(run.state):
        run.write_card("running", environment(), planned.about_data)
        trained = [name for name, guest in planned.guests.items() if isinstance(guest, Plan)]
        measure_guests(planned, trained, device, console, allow_weak=True)
    if not (present(run.state) and (run.path / FILE).is_file()):  # the extra images may be many to read
        learned_from = [weights for weights in (planned.init, *planned.trained_guests.values()) if weights is not None]
        extra = [] if planned.extra is None else [planned.extra]
        write_trained_on(run, (*planned.images, *extra), learned_from)


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
    """Hold the run's folder, so that nobody else trains the same run; the system frees it at any death.

    Of several ranks the first one holds it for all.

    Args:
        waits: where given, for a guest's run, wait for the other process until there is reason to stop; then yield
            False.

    Raises:
        Busy: another process holds the folder, and there is no waiting.
    """
    with ExitStack() as held:
        yield ranks.lead(lambda: _lock(run, waits, console, held))


def _lock(run: Run, waits: Interrupts | None, console: Console, held: ExitStack) -> bool:
    """Take the lock of a run's folder, as `_locked` says, until `held` is closed; return whether there is one."""
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
                return False
            if not announced:
                say(console, f"waiting for the other process that trains {run.path}")
            announced = True
        except OSError as error:
            raise UserError(f"cannot lock {run.path / '.lock'}: {error.strerror}") from None
    held.callback(lock.release)
    run.remove_leftovers()
    return True
