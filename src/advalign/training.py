"""Training as a verb: plan a run and the guests it needs, refuse what cannot work, then fit them one after another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from advalign import models
from advalign.data import Dataset, hold_out, load, stratified_subset
from advalign.errors import UserError, require
from advalign.fit import Row, fit
from advalign.interrupts import Interrupts
from advalign.objectives import Method, Objective, compose, parse
from advalign.recipes import Recipe
from advalign.runs import Run, require_classes, weights_of
from advalign.runs.checkpoint import load_into, load_weights
from advalign.runtime import environment, pick_device, place, seeded
from advalign.threats import threat

_ATTACK_FIELDS = ("norm", "eps", "steps", "step_size", "start", "mode")
# How a guest is made when none is given. The student's own architecture, data and recipe.
_SHOWN = {"clean": "validation: clean", "robust": "PGD-10"}
GUEST_METHODS = {"vanilla": "natural"}


@dataclass(frozen=True)
class _Plan:
    """One run to be, its networks built and tried; nothing is on disk yet."""

    run: Run
    method: Method
    recipe: Recipe
    guests: Mapping[str, Path | _Plan]
    space: int  # bytes on disk


def train(
    method: str | Method,
    *,
    data: str | Dataset,
    model: str,
    recipe: Recipe | None = None,
    runs: str | Path = "runs",
    name: str | None = None,
    guests: Mapping[str, str | Path] | None = None,
    data_dir: str | Path | None = None,
    image_size: int = 32,
    device: str = "auto",
    time_budget: float | None = None,
    checkpoint_seconds: float = 120.0,
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
        name: the run's folder below `runs`; named by its content if not given.
        time_budget: seconds for this call.
        sinks: called once per run; what it returns is called with each epoch's row of the log.

    Raises:
        UserError: anything that cannot work, before anything is written.
        TrainingError: a loss that is not finite.
    """
    method = parse(method) if isinstance(method, str) else method
    recipe = recipe or Recipe()
    console = console or Console(quiet=True)
    dataset = load(data, directory=data_dir, image_size=image_size) if isinstance(data, str) else data
    if dataset.note:
        console.print(f"{dataset.name}: {dataset.note}", soft_wrap=True)
    where = pick_device(device)
    splits = _split(dataset, recipe)
    plan = _plan(method, dataset, models.canonical(model), recipe, Path(runs), name, guests or {})
    for each in _in_order(plan):
        each.run.require_space(each.space)
    with Interrupts(time_budget) as interrupts, _progress(console) as bars:
        for each in _in_order(plan):
            if each.run.finished:
                console.print(f"[dim]finished before: {each.run.path}[/]", highlight=False, soft_wrap=True)
                continue
            if interrupts.reason or not _execute(
                each, dataset, splits, where, interrupts, checkpoint_seconds, sinks, bars
            ):
                console.print(
                    f"[yellow]Stopped: {interrupts.reason}.[/] The state is saved in {each.run.path}; "
                    "give the same command again to go on.",
                    soft_wrap=True,
                )
                break
    return plan.run


def _plan(
    method: Method, dataset: Dataset, model: str, recipe: Recipe, runs: Path, name: str | None, given: Mapping[str, Any]
) -> _Plan:
    """Name the run and its guests, and refuse what cannot work."""
    strangers = sorted(given.keys() - set(method.guests))
    require(
        not strangers, f"{method} takes no {strangers[0] if strangers else ''} model: it needs {list(method.guests)}"
    )
    threat(recipe.norm, recipe.eps)
    if method.base.craft is None:  # what a natural run does not use must not name it, or guests would not be shared
        recipe = replace(recipe, **{f.name: f.default for f in fields(Recipe) if f.name in _ATTACK_FIELDS})
    guests: dict[str, Path | _Plan] = {}
    for guest in method.guests:
        if guest in given:
            guests[guest] = weights_of(given[guest])
        else:
            require(guest in GUEST_METHODS, f"{method} needs a {guest} model, which has to be given")
            guests[guest] = _plan(parse(GUEST_METHODS[guest]), dataset, model, recipe, runs, None, {})
    setting = {
        "method": str(method),
        "data": dataset.name,
        "model": model,
        "classes": dataset.classes,
        "shape": dataset.shape,
        "images": dataset.digest,
        "recipe": asdict(recipe),
        "guests": {guest: _identity(source) for guest, source in guests.items()},
    }
    run = Run.at(runs, json.loads(json.dumps(setting)), name)
    plan = _Plan(run, method, recipe, guests, space=0)
    objective = _try(plan, dataset, model)
    learned = sum(tensor.numel() * tensor.element_size() for tensor in objective.learned_state().values())
    # Two weights files, the state with momentum, and that once more while it is written; room for the log.
    return replace(plan, space=6 * learned + (1 << 20))


def _identity(source: Path | _Plan) -> str:
    if isinstance(source, _Plan):
        return source.run.id
    if source.name == "best.safetensors" and (source.parent / "run.json").exists():
        run = Run.read(source.parent)
        if run.finished:  # then a guest that is given and one that was trained on the way are the same
            return run.id
    return hashlib.sha256(source.read_bytes()).hexdigest()[:10]


def _in_order(plan: _Plan) -> list[_Plan]:
    """Return the guests' plans first, then the plan itself."""
    return [*(p for guest in plan.guests.values() if isinstance(guest, _Plan) for p in _in_order(guest)), plan]


def _try(plan: _Plan, dataset: Dataset, model: str) -> Objective:
    """Build the objective and run it once on blank images, so that what does not fit shows before work starts."""
    objective = _bind(plan, model, dataset, blank=True).eval()
    x, y = torch.zeros(2, *dataset.shape), torch.zeros(2, dtype=torch.long)
    models.check_output(objective.student, dataset.shape, dataset.classes)
    with torch.no_grad():
        objective(x, x, y)
    return objective


def _bind(plan: _Plan, model: str, dataset: Dataset, *, blank: bool = False) -> Objective:
    """Build the networks and load the guests; a blank guest that is still to be trained stays as it was initialised."""

    def network(role: str, spelled: str = model) -> nn.Module:
        with seeded(plan.recipe.seed, role):
            return models.build(spelled, classes=dataset.classes, channels=dataset.shape[0])

    guests: dict[str, nn.Module] = {}
    for name, source in plan.guests.items():
        guests[name] = network(name)
        if isinstance(source, Path) or not blank:
            path = source if isinstance(source, Path) else source.run.weights("best")
            state, card = load_weights(path)
            require_classes(path, card, dataset.classes, dataset.name)
            guests[name] = network(name, card.get("model", model))
            load_into(guests[name], state, str(path))
            models.check_output(guests[name], dataset.shape, dataset.classes)
    return compose(plan.method, student=network("student"), **guests)


def _execute(
    plan: _Plan,
    dataset: Dataset,
    splits: tuple[Any, Any],
    device: torch.device,
    interrupts: Interrupts,
    checkpoint_seconds: float,
    sinks: Callable[[Run], list[Callable[[Row], None]]],
    bars: Progress,
) -> bool:
    """Fit one planned run; return whether it is finished."""
    run, recipe = plan.run, plan.recipe
    objective = place(_bind(plan, run.setting["model"], dataset), device)
    train_images, validation = (part.to(device) for part in splits)
    card = {
        **{key: run.setting[key] for key in ("method", "data", "model", "classes")},
        "channels": dataset.shape[0],
        **({} if plan.method.base.craft is None else {"norm": recipe.norm, "eps": recipe.eps}),
        "epochs": recipe.epochs,
        "seed": recipe.seed,
        "training_images": len(train_images),
        "run": run.id,
    }
    if not run.state.exists():
        run.write_card("running", environment())
    task = bars.add_task(str(plan.method), total=None)
    listeners = sinks(run)

    def on_step(progress: Any, steps: int) -> None:
        bars.update(task, total=recipe.epochs * steps, completed=progress.epoch * steps + progress.step)

    def on_epoch(row: Row) -> None:
        bars.console.print(_line(row, recipe.epochs), highlight=False, soft_wrap=True)
        for listen in listeners:
            listen(row)

    bars.console.print(
        f"[bold]{plan.method}[/] on {dataset.name}, {run.setting['model']}: {run.path}", highlight=False, soft_wrap=True
    )
    with seeded(recipe.seed, "fit"):  # the loop seeds each step; the caller's random state comes back
        finished = fit(
            run, objective, train_images, validation, recipe, card=card, interrupts=interrupts,
            checkpoint_seconds=checkpoint_seconds, on_step=on_step, on_epoch=on_epoch,
        )  # fmt: skip
    if finished:
        run.write_card("finished", environment())
    bars.remove_task(task)
    return finished


def _line(row: Row, epochs: int) -> str:
    shown = [f"epoch {row['epoch']:>3}/{epochs}", f"loss {row['loss']:.4f}"]
    validation = row.get("validation", {})
    shown += [f"{label} {validation[key]:.2%}" for key, label in _SHOWN.items() if key in validation]
    return "  ".join([*shown, f"lr {row['lr']:.4f}", f"{row['seconds']:.0f} s"])


def _split(dataset: Dataset, recipe: Recipe) -> tuple[Any, Any]:
    """Hold the validation images out of the training set, then take the subset of what is left."""
    rest, validation = hold_out(dataset.train, recipe.validation, recipe.seed)
    if recipe.subset is not None:
        require(
            recipe.subset <= len(rest),
            f"subset={recipe.subset} must be at most {len(rest)}, the training images of {dataset.name} "
            f"without the {recipe.validation} held out",
        )
        rest = stratified_subset(rest, recipe.subset, recipe.seed)
    if len(rest) < 2:
        raise UserError(f"{dataset.name} leaves {len(rest)} images to train on: hold out fewer with --validation")
    return rest, validation


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeElapsedColumn(),
        TextColumn("ETA"), TimeRemainingColumn(), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
