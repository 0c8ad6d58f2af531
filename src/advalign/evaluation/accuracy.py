"""Clean and robust accuracy, image by image."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from advalign.attacks import Attack
from advalign.attacks.ascent import AttackLoss, NoGradient, value_and_grad
from advalign.attacks.classification import classified, in_fp32
from advalign.attacks.losses import cross_entropy
from advalign.attacks.pass_counter import PassCounter
from advalign.data import Images
from advalign.data.pairs import Pair, as_images
from advalign.errors import UserError, require
from advalign.evaluation.checks import (
    Verdict,
    check_black_box,
    check_clean,
    check_determinism,
    check_gradient,
    check_mode,
    check_outputs,
    judge_slips,
)
from advalign.models.modes import evaluating
from advalign.runs.checkpoint import load_state, save_state
from advalign.runtime.device import autocast
from advalign.runtime.seeds import seeded
from advalign.threats import Threat, check_images, require_inside

WORST_CASE = "worst case"
SAVE_SECONDS = 10.0
DIAGNOSE = " Run `advalign diagnose`."


class Passes(NamedTuple):
    """What an attack has cost, in images."""

    forward: int
    backward: int


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """What a model gets right, image by image."""

    correct: Mapping[str, Tensor]
    """`clean` and each attack's spelling to a boolean tensor (N,): still classified as its label."""
    seconds: Mapping[str, float]
    passes: Mapping[str, Passes] = field(default_factory=dict)
    trails: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Of each ensemble: the accuracy that is left after each of its members, in their order."""
    members: Mapping[str, Mapping[str, Passes]] = field(default_factory=dict)
    """Of each attack: what its members have cost; itself, where it is no ensemble."""
    unbounded: frozenset[str] = frozenset()
    """The attacks that may leave the threat model, so that the worst case leaves them out."""
    examples: Mapping[str, Tensor] = field(default_factory=dict)
    """Adversarial images (N, C, H, W) by attack, where they were asked for; of images lost before, the image itself."""
    warnings: tuple[str, ...] = ()
    """What makes the numbers doubtful, each in a sentence with the number behind it; see `diagnose`."""

    def __repr__(self) -> str:
        shown = [f"{name}={100 * accuracy:.1f} %" for name, accuracy in self.accuracies().items()]
        shown += [f"n={len(self)}", *([f"warnings={len(self.warnings)}"] if self.warnings else [])]
        return f"Evaluation({', '.join(shown)})"

    def __len__(self) -> int:
        return len(self.correct["clean"])

    @property
    def outcomes(self) -> dict[str, Tensor]:
        """`correct` and, where there are attacks, the worst case: images that withstand all bounded ones."""
        bounded = [flags for name, flags in self.correct.items() if name not in self.unbounded]
        if len(bounded) == 1:
            return dict(self.correct)
        return {**self.correct, WORST_CASE: torch.stack(bounded).all(0)}

    def accuracies(self) -> dict[str, float]:
        """Return each outcome's share of correct images, in [0, 1]."""
        return {name: float(outcome.double().mean()) for name, outcome in self.outcomes.items()}


def evaluate(
    model: nn.Module,
    images: Images | tuple[Tensor, Tensor],
    attacks: Attack | Sequence[Attack] = (),
    *,
    given: Mapping[str, PrecomputedExamples] | None = None,
    batch_size: int = 512,
    precision: str = "fp32",
    seed: int = 0,
    keep_examples: bool = False,
    state: Path | None = None,
    advance: Callable[[str, int], None] = lambda attack, done: None,
) -> Evaluation:
    """Measure clean accuracy and accuracy under each attack.

    Only images that are classified correctly are attacked: the others are lost already. An ensemble's members attack
    what the ones before have left, in full batches. Attacks run on a copy with BatchNorm folded into the convolutions,
    in the given precision; whether an image withstands one is decided by the unmodified model in fp32, and one with
    outputs that are not finite does not. The model and the random state are left as they were; a compiled or
    DataParallel model is evaluated by the network inside.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K), on the images' device.
        images: with labels; or a pair of floats (N, C, H, W) in [0, 1] and labels (N,).
        attacks: one or several, such as `attacks.parse("pgd(steps=20)", threat=Linf(8 / 255))`.
        given: adversarial images by name that were made elsewhere, such as on a surrogate.
        keep_examples: also return the adversarial images.
        state: a file in which what is done is kept, every 10 seconds, and from which a second call goes on; the result
            is the same to the bit. Whoever gives it sees to it that it belongs to this evaluation, and removes it.
        advance: called with an attack's spelling and the number of images just finished, for a progress bar.

    Raises:
        UserError: two attacks have one spelling, or an attack leaves its threat model; images outside [0, 1]; outputs
            that are no logits for these labels, or not finite on clean images.
    """
    taken, several = as_images(images), _as_attacks(attacks)
    if isinstance(taken, Pair):
        check_images(taken.x)
    names = [str(attack) for attack in several]
    for name in names:
        require(names.count(name) == 1, lambda: f"attack {name} is given twice: results go by spelling")
    chosen, given, model = dict(zip(names, several, strict=True)), given or {}, _inside(model)
    handed_in = check_mode([name or "the model" for name, module in model.named_modules() if module.training])
    with evaluating(model):
        work = _Evaluator(model, taken, batch_size, precision, seed, keep_examples, state, advance)
        work.classify(twice=bool(chosen or given))
        for name, examples in given.items():
            work.evaluate_given(name, examples)
        for name, attack in chosen.items():
            work.attack(name, attack)
    done = work.done
    unbounded = [name for name, attack in chosen.items() if not attack.bounded]
    unbounded += [name for name, examples in given.items() if examples.threat is None]
    doubts = [
        *_warnings([handed_in]),
        *done.doubts,
        *(f"Outputs were not finite on {k} images of {name}: they count as broken." for name, k in done.lost.items()),
        *_warnings(_broken_without_gradient(chosen, given, done, len(taken))),
    ]
    return Evaluation(
        {name: flags.cpu() for name, flags in done.correct.items()},
        done.seconds,
        {name: Passes(*counts) for name, counts in done.passes.items()},
        done.trails,
        {name: {each: Passes(*counts) for each, counts in costs.items()} for name, costs in done.members.items()},
        frozenset(unbounded),
        done.examples,
        tuple(doubts),
    )


class PrecomputedExamples(NamedTuple):
    """Adversarial images that were made elsewhere."""

    x_adv: Tensor  # (N, C, H, W) in [0, 1], of all images
    threat: Threat | None  # None: they lie in no threat model


@dataclass
class _Done:
    """What an evaluation has found so far; what its state file holds."""

    correct: dict[str, Tensor] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    passes: dict[str, list[int]] = field(default_factory=dict)
    trails: dict[str, dict[str, float]] = field(default_factory=dict)
    members: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    examples: dict[str, Tensor] = field(default_factory=dict)  # on the CPU
    doubts: list[str] = field(default_factory=list)  # of the clean pass
    lost: dict[str, int] = field(default_factory=dict)  # by attack, on how many images the outputs were not finite
    under_way: dict[str, Any] = field(default_factory=dict)  # the attack, the number of its member and batch, its rows


@final
class _Evaluator:
    """An evaluation under way."""

    def __init__(
        self,
        model: nn.Module,
        images: Images | Pair,
        batch_size: int,
        precision: str,
        seed: int,
        keep_examples: bool,
        state: Path | None,
        advance: Callable[[str, int], None],
    ) -> None:
        self.model, self.images, self.batch_size, self.precision = model, images, batch_size, precision
        self.seed, self.keep_examples, self.state, self.advance = seed, keep_examples, state, advance
        self.done, self.saved = _Done(), time.monotonic()
        if state is not None and state.exists():
            self.done = _Done(**load_state(state, ("correct", "under_way")))
        self.everything = torch.arange(len(images), device=images.labels.device)
        self.fast: PassCounter | None = None

    def classify(self, *, twice: bool) -> None:
        """Classify the clean images, the first batch twice if something is to follow."""
        if "clean" in self.done.correct:
            return self.advance("clean", len(self.images))
        began = time.monotonic()
        labels, logits = self.images.labels, []
        for k, rows in enumerate(self.everything.split(self.batch_size)):
            with seeded(self.seed, "clean", k):
                logits.append(check_logits(self._logits(self.images.floats(rows)), labels[rows]))
            self.advance("clean", len(rows))
        outputs = torch.cat(logits)
        require_finite(outputs)
        correct = classified(outputs, labels)
        verdicts = [check_outputs(logits[0]), check_clean(correct, 1 / logits[0].shape[1])]
        self.done.doubts = [*_warnings(verdicts), *_warnings(self._second_look(logits[0], correct) if twice else ())]
        self.done.correct["clean"] = correct
        self.done.seconds["clean"] = time.monotonic() - began
        self.done.passes["clean"] = [len(self.images), 0]

    def _second_look(self, logits: Tensor, correct: Tensor) -> Iterator[Verdict]:
        """Pass the first batch forth and back: a model that draws at random or has no gradient escapes attacks."""
        rows = self.everything[: self.batch_size]
        x, y = self.images.floats(rows), self.images.labels[rows]
        with seeded(self.seed, "again"), in_fp32(x.device), torch.enable_grad(), _in_silence():
            again = value_and_grad(AttackLoss(self.model, cross_entropy, y), x)
        yield check_determinism(logits, again.outputs)
        if (right := correct[rows]).any():
            yield check_gradient(again.grad[right])

    def evaluate_given(self, name: str, examples: PrecomputedExamples) -> None:
        """Classify adversarial images that are there already."""
        if name in self.done.correct:
            return self.advance(name, len(self.images))
        began = time.monotonic()
        correct = self.done.correct["clean"].to(self.everything.device, copy=True)
        for k, rows in enumerate(self.everything.split(self.batch_size)):
            x, x_adv = self.images.floats(rows), examples.x_adv[rows.cpu()].to(rows.device)
            require_inside(name, examples.threat, x_adv, x)
            with seeded(self.seed, name, k):
                correct[rows] &= self._withstands(name, x_adv, rows)
            self.advance(name, len(rows))
        self.done.correct[name], self.done.passes[name] = correct, [len(self.images), 0]
        self.done.seconds[name] = time.monotonic() - began

    def attack(self, name: str, attack: Attack) -> None:
        """Attack what is classified correctly, and note what is left."""
        done, under_way = self.done, self.done.under_way
        device = self.everything.device
        if name in done.correct and under_way.get("attack") != name:
            return self.advance(name, len(self.images))
        if under_way.get("attack") != name:
            clean = done.correct["clean"].to(device)
            under_way.clear()
            under_way |= {"attack": name, "member": 0, "batch": 0, "rows": self.everything[clean]}
            done.correct[name], done.seconds[name], done.passes[name] = clean.clone(), 0.0, [0, 0]
            if self.keep_examples:
                done.examples[name] = self.images.floats().cpu().clone()
        correct = done.correct[name] = done.correct[name].to(device)
        self.fast = self.fast or PassCounter(self.model)
        members = attack.members
        self.advance(name, len(self.images) - len(under_way["rows"]))
        for number in range(under_way["member"], len(members)):
            rows = under_way["rows"].to(device)
            for k, batch in list(enumerate(rows.split(self.batch_size) if len(rows) else ()))[under_way["batch"] :]:
                began, before = time.monotonic(), self.fast.counts
                x, y = self.images.floats(batch), self.images.labels[batch]
                with seeded(self.seed, name, number, k):
                    with autocast(x.device, self.precision), _in_silence():
                        x_adv = members[number](self.fast, x, y)
                    require_inside(name, members[number].threat if members[number].bounded else None, x_adv, x)
                    correct[batch] = self._withstands(name, x_adv, batch)
                if self.keep_examples:
                    done.examples[name][batch.cpu()] = x_adv.cpu()
                done.seconds[name] += time.monotonic() - began
                member = done.members.setdefault(name, {}).setdefault(str(members[number]), [0, 0])
                for counted in (done.passes[name], member):
                    counted[:] = [a + b - c for a, b, c in zip(counted, self.fast.counts, before, strict=True)]
                under_way["batch"] = k + 1
                self._save()
                last = number == len(members) - 1
                self.advance(name, len(batch) if last else int((~correct[batch]).sum()))
            rows = rows[correct[rows]]
            if len(members) > 1:
                done.trails.setdefault(name, {})[str(members[number])] = float(correct.double().mean())
            under_way |= {"member": number + 1, "batch": 0, "rows": rows}
        under_way.clear()
        self._save()

    def _withstands(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        logits = self._logits(x)
        if lost := int((~logits.isfinite().all(1)).sum()):
            self.done.lost[name] = self.done.lost.get(name, 0) + lost
        return classified(logits, self.images.labels[rows])

    def _logits(self, x: Tensor) -> Tensor:
        with torch.no_grad(), in_fp32(x.device):
            return self.model(x)

    def _save(self) -> None:
        if self.state is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            save_state(self.state, vars(self.done))
            self.saved = time.monotonic()


def _as_attacks(given: Any) -> list[Attack]:
    attacks: list[Any] = [given] if isinstance(given, str) or callable(given) else list(given)
    for each in attacks:
        example = f'attacks.parse("{each}", threat=Linf(8/255))'
        require(not isinstance(each, str), lambda: f"attack {each!r} needs a threat model: write {example}")
    return attacks


def _warnings(verdicts: Iterable[Verdict]) -> list[str]:
    """Spell out those that falsify numbers."""
    grave = [
        each for each in verdicts if each.passed == "fail" or (each.name, each.passed) == ("clean accuracy", "warn")
    ]
    masked = {"gradient", "black box"}
    return [f"{each.sentence} {each.advice}{DIAGNOSE if each.name in masked else ''}" for each in grave]


@contextmanager
def _in_silence() -> Iterator[None]:
    """Keep back what the evaluation says itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoGradient)
        yield


def _inside(model: nn.Module) -> nn.Module:
    """Return the network in a wrapper of torch's: compiled, DataParallel, DistributedDataParallel."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _inside(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _inside(inner) if isinstance(inner, nn.Module) else model


def check_logits(outputs: object, labels: Tensor) -> Tensor:
    """Return a model's outputs for some images if they can be logits for labels such as these.

    Raises:
        UserError: they are no tensor, have another shape than (N, K), or too few columns.
    """
    if not isinstance(outputs, Tensor):
        raise UserError(f"the model must return logits, a tensor (N, K), not {type(outputs).__name__}")
    shape, n = tuple(outputs.shape), len(labels)
    fits = outputs.ndim == 2 and len(outputs) == n and outputs.shape[1] > 1
    require(fits, lambda: f"the model must return logits (N, K), K classes, not {shape} for {n} images")
    low, high = int(labels.min()), int(labels.max())
    classes = f"classes 0 to {shape[-1] - 1}"
    require(
        low >= 0 and high < shape[-1],
        lambda: f"the model's {shape[-1]} outputs are {classes}, but labels are {low} to {high}",
    )
    return outputs


def require_finite(logits: Tensor) -> None:
    """Refuse a model whose logits (N, K) on clean images are not all numbers.

    Raises:
        UserError: on how many they are not.
    """
    bad = int((~logits.isfinite().all(1)).sum())
    require(bad == 0, lambda: f"the model's outputs are not finite on {bad} of {len(logits)} clean images")


def _broken_without_gradient(
    attacks: Mapping[str, Attack], given: Mapping[str, PrecomputedExamples], found: _Done, n: int
) -> Iterator[Verdict]:
    """Judge what broke images without the model's gradient, where there was an attack with it in the same threat."""
    bounded = {name: attack for name, attack in attacks.items() if attack.bounded}
    white = {name: a.threat for name, a in bounded.items() if all(member.uses_gradients for member in a.members)}
    black = {name: attack.threat for name, attack in bounded.items() if not attack.uses_gradients}
    black |= {name: examples.threat for name, examples in given.items() if examples.threat is not None}
    for name, threat in black.items():
        if same := [found.correct[other] for other, its in white.items() if its == threat]:
            yield check_black_box(torch.stack(same).all(0), {name: found.correct[name]})
    for name, trail in found.trails.items():
        left, members = None, {str(member): member for member in attacks[name].members}
        for member, after in trail.items():
            if left is not None and not members[member].uses_gradients:
                yield judge_slips(f"{member} in {name}", round((left - after) * n), round(left * n), n)
            left = after
