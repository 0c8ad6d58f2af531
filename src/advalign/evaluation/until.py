"""How many images are enough: an evaluation that goes on, in stratified draws, until its intervals are narrow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from advalign.attacks import Attack
from advalign.data.images import stratified_split
from advalign.errors import require
from advalign.evaluation.accuracy import Evaluation, conclude, prepared, require_room
from advalign.evaluation.checks import check_clean, warnings_of
from advalign.evaluation.evaluator import Evaluator
from advalign.evaluation.interval import half_width, images_needed
from advalign.evaluation.options import AttackOptions
from advalign.evaluation.state import EvaluationState
from advalign.evaluation.target import SUBSET_SEED, Target
from advalign.models.adapted import adapted
from advalign.models.modes import evaluating
from advalign.runtime.files import present
from advalign.runtime.progress import counting, say


def check_until(until: float) -> None:
    """Refuse a half-width that no interval has.

    Raises:
        UserError: it.
    """
    require(0 < until < 50, lambda: f"until={until:g} must be above 0 and below 50: half the width of an interval, %")


def evaluate_until(
    target: Target,
    attacks: Sequence[Attack],
    until: float,
    how: AttackOptions,
    *,
    keep_examples: bool,
    state: Path,
    console: Console,
) -> tuple[Evaluation, Target]:
    """Evaluate on more and more of the test images, until every accuracy is sure enough or no image is left.

    The images are those that `n` would draw, of the number that is reached. Each draw is one evaluation of the images
    that were not in the last, so the first has as few as may suffice, and each further one as many as are missing.

    Args:
        until: half the width of the widest 95 % interval (Wilson), in points.
        state: the file in which the first part keeps its progress; the others have one each beside it.
        console: where to say how far it is.

    Returns:
        What was measured, and the target with the images on which it was.

    Raises:
        UserError: as `prepared`, before the first draw; the adversarial images to keep take more memory than is free.
    """
    network, (by_name, images) = adapted(target.net), prepared(attacks, target.images, how.batch_size)
    if present(begun := _part_file(state, 0)):
        say(console, f"resuming an interrupted evaluation: {begun}")
    drawn, parts, total = torch.tensor([], dtype=torch.long), [], len(target.images)
    rows, size = drawn, images_needed(0.0, until / 100)
    with evaluating(network.net) as in_train_mode:
        while True:
            more, drawn = next_draw(target.dataset.test.labels, drawn, min(size, total))
            rows = torch.cat((rows, more))
            if keep_examples:
                require_room(len(by_name), torch.Size((len(rows), *images.shape[1:])))
            with counting(console, ["clean", *by_name], len(more)) as advance:
                evaluator = Evaluator(
                    network, images.take(more.to(images.labels.device)), how,
                    keep_examples=keep_examples, state_file=_part_file(state, len(parts)), advance=advance,
                )  # fmt: skip
                evaluator.classify_clean(attacked=bool(by_name))
                for name, attack in by_name.items():
                    evaluator.attack(name, attack)
            parts.append(evaluator.state)
            whole = joined(parts, rows.argsort(), target.dataset.test.labels.cpu()[rows])
            evaluation = conclude(whole, by_name, {}, len(rows), in_train_mode=in_train_mode)
            shares = evaluation.accuracies().values()
            widest = 100 * max(half_width(share, len(rows)) for share in shares)
            size = max(images_needed(share, until / 100) for share in shares)
            reached = f"{len(rows)} images: all accuracies to ± {widest:.2f} points or better"
            if widest <= until or len(rows) == total:
                end = "" if widest <= until else f"; {until:g} would take {size} images"
                say(console, f"{reached}{end}")
                taken = target.images.take(drawn.to(target.images.labels.device))
                return evaluation, replace(target, images=taken)
            say(console, f"{reached}; on to {min(size, total)}")


def _part_file(state: Path, number: int) -> Path:
    return state.with_name(f"{state.stem}-{number}{state.suffix}")


def next_draw(labels: Tensor, drawn: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the images that a stratified draw adds to the last, and the draw itself; row numbers, ascending.

    Args:
        labels: (N,) of all images.
        drawn: the row numbers of the last draw.
        size: how many to draw; a few more, where the draw of just so many lacks an image of the last.
    """
    for n in range(size, len(labels) + 1):
        larger = stratified_split(labels, n, SUBSET_SEED)[1]
        new = ~torch.isin(larger, drawn)
        if int(new.sum()) == n - len(drawn):
            return larger[new], larger
    raise AssertionError("all images contain those of every draw")


def joined(parts: Sequence[EvaluationState], order: Tensor, labels: Tensor) -> EvaluationState:
    """Return what was measured on all parts together, the images in an order: numbers of the parts' images in a row.

    Args:
        labels: (N,) of the parts' images in a row, on the CPU.
    """
    whole, sizes = EvaluationState(doubts=_doubts(parts, labels)), [len(part.correct["clean"]) for part in parts]
    for name in parts[0].correct:
        whole.correct[name] = torch.cat([part.correct[name] for part in parts])[order.to(parts[0].correct[name].device)]
        whole.seconds[name] = sum(part.seconds[name] for part in parts)
        whole.passes[name] = [sum(column) for column in zip(*(part.passes[name] for part in parts), strict=True)]
        if lost := sum(part.lost.get(name, 0) for part in parts):
            whole.lost[name] = lost
        if any(name in part.examples for part in parts):
            whole.examples[name] = torch.cat([part.examples[name] for part in parts])[order]
        if targeted := [part.targeted[name] for part in parts if name in part.targeted]:
            whole.targeted[name] = [sum(column) for column in zip(*targeted, strict=True)]
        for part, size in zip(parts, sizes, strict=True):
            for member, share in part.trails.get(name, {}).items():
                trail = whole.trails.setdefault(name, {})
                trail[member] = trail.get(member, 0.0) + share * size / sum(sizes)
            for member, costs in part.members.get(name, {}).items():
                so_far = whole.members.setdefault(name, {}).setdefault(member, [0, 0])
                so_far[:] = [a + b for a, b in zip(so_far, costs, strict=True)]
    return whole


def _doubts(parts: Sequence[EvaluationState], labels: Tensor) -> list[str]:
    """Return what every part's clean pass gave rise to, each once; the clean accuracy is judged on all images."""
    rights = [part.correct["clean"].cpu() for part in parts]
    of_few = [
        text
        for right, own in zip(rights, labels.split([len(right) for right in rights]), strict=True)
        for text in warnings_of([check_clean(right, own)])
    ]
    of_all = warnings_of([check_clean(torch.cat(rights), labels)])
    found = dict.fromkeys(doubt for part in parts for doubt in part.doubts if doubt not in of_few)
    return [*found, *of_all]
