"""An evaluation under way: the clean pass, precomputed examples, and attacks batch by batch, each resumable."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple, final

import torch
from torch import Tensor

from advalign.attacks import Attack
from advalign.attacks.ascent import AttackLoss, NoGradient, value_and_grad
from advalign.attacks.classification import classified, in_fp32
from advalign.attacks.losses import cross_entropy
from advalign.attacks.pass_counter import PassCounter
from advalign.attacks.quantized import rounded
from advalign.data import Images
from advalign.evaluation.checks import (
    Verdict,
    check_clean,
    check_determinism,
    check_gradient,
    check_outputs,
    warnings_of,
)
from advalign.evaluation.logits import check_logits, require_finite
from advalign.evaluation.options import AttackOptions
from advalign.evaluation.state import CurrentAttack, EvaluationState, StateFile
from advalign.models.adapted import Adapted
from advalign.models.mix import Mix
from advalign.runtime import ranks
from advalign.runtime.device import autocast
from advalign.runtime.files import present
from advalign.runtime.seeds import seeded
from advalign.threats import Threat, require_inside


class PrecomputedExamples(NamedTuple):
    """Adversarial images that exist already, such as those made on a surrogate."""

    x_adv: Tensor
    """(N, C, H, W) in [0, 1], of all images."""
    threat: Threat | None
    """The threat model that they lie in; None if they are not bounded."""

    def rounded(self, x: Tensor, bits: int) -> PrecomputedExamples:
        """Return the examples of images x (N, C, H, W) rounded to so many bits, inside the threat model."""
        return PrecomputedExamples(rounded(self.x_adv, x.to(self.x_adv.device), self.threat, bits), self.threat)


class _Outcome(NamedTuple):
    """What has become of a batch under an attack."""

    correct: Tensor
    """(N,) whether the image withstands."""
    examples: Tensor | None
    """The adversarial images, where they are kept."""
    lost: int
    """Images with outputs that are not finite."""
    seconds: float
    passes: list[int]
    targeted: tuple[int, int] | None
    """How many images are classified as their target, and how many were driven to one."""


@final
class Evaluator:
    """A model in eval mode, the images, and what has been measured on them so far.

    Args:
        state_file: from which the evaluation is resumed if it exists, and to which progress is saved.
        advance: called with `clean` or an attack's spelling and the number of images just finished.
    """

    def __init__(
        self,
        model: Adapted,
        images: Images,
        options: AttackOptions,
        *,
        keep_examples: bool,
        state_file: Path | None,
        advance: Callable[[str, int], None],
    ) -> None:
        self.model, self.images, self.options = model, images, options
        self.keep_examples, self.state_file, self.advance = keep_examples, StateFile(state_file), advance
        self.state = EvaluationState()
        if state_file is not None and present(state_file):
            self.state = EvaluationState.read(state_file, len(images))
        self.everything = torch.arange(len(images), device=images.labels.device)

    @cached_property
    def counter(self) -> PassCounter:
        """The network that attacks run on; folding BatchNorm takes a while, so it is made for the first attack."""
        return PassCounter(self.model)

    def classify_clean(self, *, attacked: bool) -> None:
        """Classify the clean images; if they are attacked afterwards, check the first batch for masked gradients."""
        if "clean" in self.state.correct:
            return self.advance("clean", len(self.images))
        began = time.monotonic()
        labels, logits = self.images.labels, []

        def classify(batch: tuple[int, Tensor]) -> Tensor:
            k, rows = batch
            with seeded(self.options.seed, "clean", k):
                return check_logits(self._logits(self.images.floats(rows)), labels[rows])

        for output in ranks.spread([*enumerate(self.everything.split(self.options.batch_size))], classify):
            logits.append(output.to(labels.device))
            self.advance("clean", len(output))
        outputs = torch.cat(logits)
        require_finite(outputs)
        correct = classified(outputs, labels)
        verdicts = [check_outputs(logits[0], mix=isinstance(self.model.net, Mix)), check_clean(correct, labels)]
        repeated = self._repeat_first_batch(logits[0], correct) if attacked else ()
        self.state.doubts = [*warnings_of(verdicts), *warnings_of(repeated)]
        self.state.correct["clean"] = correct
        self.state.seconds["clean"] = time.monotonic() - began
        self.state.passes["clean"] = [len(self.images), 0]

    def adopt_clean(self, correct: Tensor, seconds: float, doubts: Sequence[str]) -> None:
        """Take the outcomes of the clean images from another evaluation of the same model on the same images."""
        if "clean" not in self.state.correct:
            self.state.correct["clean"] = correct.to(self.everything.device)
            self.state.seconds["clean"], self.state.doubts = seconds, list(doubts)
            self.state.passes["clean"] = [len(self.images), 0]

    def _repeat_first_batch(self, logits: Tensor, correct: Tensor) -> Iterator[Verdict]:
        """Pass the first batch forward and backward: a model that is random or has no gradient escapes attacks."""
        rows = self.everything[: self.options.batch_size]
        x, y = self.images.floats(rows), self.images.labels[rows]
        with seeded(self.options.seed, "again"), in_fp32(x.device), torch.enable_grad(), _no_gradient_silenced():
            again = value_and_grad(AttackLoss(self.model, cross_entropy, y), x)
        yield check_determinism(logits, again.outputs)
        if (right := correct[rows]).any():
            yield check_gradient(again.grad[right])

    def evaluate_precomputed(self, name: str, examples: PrecomputedExamples) -> None:
        """Classify adversarial images that exist already."""
        if name in self.state.correct:
            return self.advance(name, len(self.images))
        began = time.monotonic()
        correct = self.state.correct["clean"].to(self.everything.device, copy=True)
        for k, rows in enumerate(self.everything.split(self.options.batch_size)):
            x, x_adv = self.images.floats(rows), examples.x_adv[rows.cpu()].to(rows.device)
            require_inside(name, examples.threat, x_adv, x)
            with seeded(self.options.seed, name, k):
                correct[rows] &= classified(self._logits_under(name, x_adv), self.images.labels[rows])
            self.advance(name, len(rows))
        self.state.correct[name], self.state.passes[name] = correct, [len(self.images), 0]
        self.state.seconds[name] = time.monotonic() - began

    def attack(self, name: str, attack: Attack) -> None:
        """Attack the images that are classified correctly, member by member, and note which withstand."""
        state, device = self.state, self.everything.device
        current = state.under_way
        if current is None or current.attack != name:
            if name in state.correct:
                return self.advance(name, len(self.images))
            current = state.under_way = self._begin(name)
        state.correct[name], current.rows = state.correct[name].to(device), current.rows.to(device)
        self.advance(name, len(self.images) - len(current.rows))
        for member in attack.members[current.member :]:
            self._run_member(member, current, last=current.member == len(attack.members) - 1)
            if len(attack.members) > 1:
                state.trails.setdefault(name, {})[str(member)] = float(state.correct[name].double().mean())
        state.under_way = None
        self.state_file.save(state.content())

    def _begin(self, name: str) -> CurrentAttack:
        clean = self.state.correct["clean"].to(self.everything.device)
        self.state.correct[name], self.state.seconds[name], self.state.passes[name] = clean.clone(), 0.0, [0, 0]
        if self.keep_examples:
            self.state.examples[name] = self.images.to("cpu").floats().clone()
        return CurrentAttack(name, self.everything[clean])

    def _run_member(self, member: Attack, current: CurrentAttack, *, last: bool) -> None:
        """Attack what the members before have left, in batches from the first that is not done."""
        correct = self.state.correct[current.attack]
        batches = current.rows.split(self.options.batch_size) if len(current.rows) else ()
        left = [*enumerate(batches)][current.batch :]
        outcomes = ranks.spread(left, partial(self._attack_batch, member, current))
        for (_, rows), outcome in zip(left, outcomes, strict=True):
            self._note(member, current, rows, outcome)
            current.batch += 1
            self.state_file.save(self.state.content())
            self.advance(current.attack, len(rows) if last else int((~correct[rows]).sum()))
        current.rows = current.rows[correct[current.rows]]
        current.member, current.batch = current.member + 1, 0

    def _attack_batch(self, member: Attack, current: CurrentAttack, batch: tuple[int, Tensor]) -> _Outcome:
        """Attack one batch, by its number and its images; nothing is noted yet."""
        number, rows = batch
        began, before = time.monotonic(), self.counter.counts
        x, y = self.images.floats(rows), self.images.labels[rows]
        with seeded(self.options.seed, current.attack, current.member, number):
            with autocast(x.device, self.options.precision), _no_gradient_silenced():
                x_adv = member(self.counter, x, y)
            require_inside(current.attack, member.threat if member.bounded else None, x_adv, x)
            logits = self._logits(x_adv)
        lost = int((~logits.isfinite().all(1)).sum())
        seconds, passes = time.monotonic() - began, self.counter.counts
        arrived, driven = 0, 0
        if (targets := self._targets(member, current, number, x, y)) is not None:
            others = targets != y
            arrived, driven = int((classified(logits, targets) & others).sum()), int(others.sum())
        return _Outcome(
            classified(logits, y), x_adv.cpu() if self.keep_examples else None, lost, seconds,
            [a - b for a, b in zip(passes, before, strict=True)], None if targets is None else (arrived, driven),
        )  # fmt: skip

    def _note(self, member: Attack, current: CurrentAttack, rows: Tensor, outcome: _Outcome) -> None:
        """Note what has become of a batch."""
        name, state = current.attack, self.state
        state.correct[name][rows] = outcome.correct.to(rows.device)
        if outcome.examples is not None:
            state.examples[name][rows.cpu()] = outcome.examples
        if outcome.lost:
            state.lost[name] = state.lost.get(name, 0) + outcome.lost
        state.seconds[name] += outcome.seconds
        of_member = state.members.setdefault(name, {}).setdefault(str(member), [0, 0])
        for passes in (state.passes[name], of_member):
            passes[:] = [a + b for a, b in zip(passes, outcome.passes, strict=True)]
        if outcome.targeted is not None:
            counts = state.targeted.setdefault(name, [0, 0])
            counts[:] = [a + b for a, b in zip(counts, outcome.targeted, strict=True)]

    def _targets(self, member: Attack, current: CurrentAttack, number: int, x: Tensor, y: Tensor) -> Tensor | None:
        """Return the classes (N,) to which an attack has driven images, from the random state in which it began."""
        begin = seeded(self.options.seed, current.attack, current.member, number)
        with begin, autocast(x.device, self.options.precision):
            return member.target_classes(self.counter, x, y)

    def _logits_under(self, name: str, x: Tensor) -> Tensor:
        """Return the logits of adversarial images, and count those that are not finite."""
        logits = self._logits(x)
        if lost := int((~logits.isfinite().all(1)).sum()):
            self.state.lost[name] = self.state.lost.get(name, 0) + lost
        return logits

    def _logits(self, x: Tensor) -> Tensor:
        with torch.no_grad(), in_fp32(x.device):
            return self.model(x)


@contextmanager
def _no_gradient_silenced() -> Iterator[None]:
    """Suppress an attack's warning about missing gradients, which the evaluation gives itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoGradient)
        yield
