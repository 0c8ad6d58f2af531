"""Clean and robust accuracy, image by image."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from advalign.attacks import Attack, spelled
from advalign.data import Images
from advalign.errors import require
from advalign.models.fold import Folded
from advalign.models.modes import evaluating
from advalign.runs.checkpoint import load_state, save_state
from advalign.runtime import autocast, seeded
from advalign.threats import Threat, check_images

WORST_CASE = "worst case"
SAVE_SECONDS = 10.0


class Passes(NamedTuple):
    """What an attack has cost, in images."""

    forward: int
    backward: int


@dataclass(frozen=True, eq=False)
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
    images: Images,
    attacks: Sequence[Attack] = (),
    *,
    given: Mapping[str, Given] | None = None,
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
    in the given precision; whether an image withstands one is decided by the unmodified model in fp32. The model and
    the random state are left as they were; a compiled or DataParallel model is evaluated by the network inside.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K), on the images' device.
        given: adversarial images by name that were made elsewhere, such as on a surrogate.
        keep_examples: also return the adversarial images.
        state: a file in which what is done is kept, every 10 seconds, and from which a second call goes on; the result
            is the same to the bit. Whoever gives it sees to it that it belongs to this evaluation, and removes it.
        advance: called with an attack's spelling and the number of images just finished, for a progress bar.

    Raises:
        UserError: two attacks have one spelling, or an attack leaves its threat model.
    """
    names = [spelled(attack) for attack in attacks]
    for name in names:
        require(names.count(name) == 1, f"attack {name} is given twice: results go by spelling")
    model = _inside(model)
    with evaluating(model):
        work = _Work(model, images, batch_size, precision, seed, keep_examples, state, advance)
        work.classify()
        for name, examples in (given or {}).items():
            work.show(name, examples)
        for name, attack in zip(names, attacks, strict=True):
            work.attack(name, attack)
    done = work.done
    unbounded = [name for name, attack in zip(names, attacks, strict=True) if not attack.bounded]
    unbounded += [name for name, examples in (given or {}).items() if examples.threat is None]
    return Evaluation(
        {name: flags.cpu() for name, flags in done.correct.items()},
        done.seconds,
        {name: Passes(*counts) for name, counts in done.passes.items()},
        done.trails,
        {name: {each: Passes(*counts) for each, counts in costs.items()} for name, costs in done.members.items()},
        frozenset(unbounded),
        {name: examples.cpu() for name, examples in done.examples.items()},
    )


class Given(NamedTuple):
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
    examples: dict[str, Tensor] = field(default_factory=dict)
    under_way: dict[str, Any] = field(default_factory=dict)  # the attack, the number of its member and batch, its rows


@final
class _Work:
    """An evaluation under way."""

    def __init__(
        self,
        model: nn.Module,
        images: Images,
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
        self.fast: _Counted | None = None

    def classify(self) -> None:
        """Classify the clean images."""
        if "clean" in self.done.correct:
            return self.advance("clean", len(self.images))
        began = time.monotonic()
        correct = torch.zeros_like(self.everything, dtype=torch.bool)
        for rows in self.everything.split(self.batch_size):
            correct[rows] = self._withstands(self.images.floats(rows), rows)
            self.advance("clean", len(rows))
        self.done.correct["clean"] = correct
        self.done.seconds["clean"] = time.monotonic() - began
        self.done.passes["clean"] = [len(self.images), 0]

    def show(self, name: str, examples: Given) -> None:
        """Classify adversarial images that are there already."""
        if name in self.done.correct:
            return self.advance(name, len(self.images))
        began = time.monotonic()
        correct = self.done.correct["clean"].to(self.everything.device, copy=True)
        for rows in self.everything.split(self.batch_size):
            x, x_adv = self.images.floats(rows), examples.x_adv[rows.cpu()].to(rows.device)
            _check_budget(name, examples.threat, x_adv, x)
            correct[rows] &= self._withstands(x_adv, rows)
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
                done.examples[name] = self.images.floats()
        correct = done.correct[name] = done.correct[name].to(device)
        self.fast = self.fast or _Counted(self.model)
        members = getattr(attack, "members", (attack,))
        self.advance(name, len(self.images) - len(under_way["rows"]))
        for number in range(under_way["member"], len(members)):
            rows = under_way["rows"].to(device)
            for k, batch in list(enumerate(rows.split(self.batch_size) if len(rows) else ()))[under_way["batch"] :]:
                began, before = time.monotonic(), self.fast.counts
                x, y = self.images.floats(batch), self.images.labels[batch]
                with seeded(self.seed, name, number, k), autocast(x.device, self.precision):
                    x_adv = members[number](self.fast, x, y)
                _check_budget(name, members[number].threat if members[number].bounded else None, x_adv, x)
                correct[batch] = self._withstands(x_adv, batch)
                if self.keep_examples:
                    done.examples[name][batch.to(done.examples[name].device)] = x_adv
                done.seconds[name] += time.monotonic() - began
                member = done.members.setdefault(name, {}).setdefault(spelled(members[number]), [0, 0])
                for counted in (done.passes[name], member):
                    counted[:] = [a + b - c for a, b, c in zip(counted, self.fast.counts, before, strict=True)]
                under_way["batch"] = k + 1
                self._save()
                last = number == len(members) - 1
                self.advance(name, len(batch) if last else int((~correct[batch]).sum()))
            rows = rows[correct[rows]]
            if len(members) > 1:
                done.trails.setdefault(name, {})[spelled(members[number])] = float(correct.double().mean())
            under_way |= {"member": number + 1, "batch": 0, "rows": rows}
        under_way.clear()
        self._save()

    @torch.no_grad()
    def _withstands(self, x: Tensor, rows: Tensor) -> Tensor:
        return self.model(x).argmax(1) == self.images.labels[rows]

    def _save(self) -> None:
        if self.state is not None and time.monotonic() - self.saved > SAVE_SECONDS:
            save_state(self.state, vars(self.done))
            self.saved = time.monotonic()


class _Counted(nn.Module):
    """The folded twin of a network, or the network itself where none can be made; counts images, forth and back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        try:
            self.net = Folded(net)
        except Exception:  # a network that cannot be copied
            self.net = net
        self.counts = [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        self.counts = [self.counts[0] + len(x), self.counts[1]]
        if logits.requires_grad:
            logits.register_hook(self._backward)
        return logits

    def _backward(self, grad: Tensor) -> None:
        self.counts = [self.counts[0], self.counts[1] + len(grad)]


def _inside(model: nn.Module) -> nn.Module:
    """Return the network in a wrapper of torch's: compiled, DataParallel, DistributedDataParallel."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return _inside(model.module)
    inner = getattr(model, "_orig_mod", None)
    return _inside(inner) if isinstance(inner, nn.Module) else model


def _check_budget(name: str, threat: Threat | None, x_adv: Tensor, x: Tensor) -> None:
    check_images(x_adv)
    if threat is None:
        return
    moved = float(threat.distance(x_adv, x).max())
    # A hair's breadth for rounding in fp32.
    require(moved <= threat.eps + 1e-5, f"{name} moved an image by {moved:g}, outside {threat}")
