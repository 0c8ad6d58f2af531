"""The curve of clean against robust accuracy over a dial: attacks on held-out images, a choice, and the test."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import Tensor, nn

from advalign.attacks import Attack, parse
from advalign.evaluation.accuracy import evaluate
from advalign.evaluation.options import AttackOptions
from advalign.evaluation.transfer import craft_examples, read_examples, write_examples
from advalign.frontier.choose import Count, choose, front
from advalign.frontier.dial import Dial, Setting
from advalign.frontier.evidence import CLEAN, Evidence
from advalign.registration import source_digests
from advalign.runs.formats import CostFile, read_checked_json, write_checked_json
from advalign.runtime.environment import environment
from advalign.runtime.files import digest
from advalign.runtime.locks import locked
from advalign.runtime.progress import counting

ON_ROBUST, ON_ACCURATE = "robust network", "accurate network"
ROBUST_TO_THE_END = "robust network, to the last step"
MARGIN, TO_THE_END = "min-margin", 'pgd(loss="margin", steps=40, until_fooled=False)'
"""The attacks on the robust and on the accurate network alone."""
CURVE = "worst(apgd-ce(steps=40), apgd-t(steps=40, targets=4))"
"""The attack on every setting of the curve, to which the examples made on the others add; the chosen one gets more."""
ROUNDS = 2
"""How often the settings that look best after an attack on those before are attacked in their turn."""


@dataclass(frozen=True)
class Point:
    """A setting with the images, (N,) bool each, that it classifies correctly."""

    setting: Setting
    clean: Tensor
    robust: Tensor
    """Those that withstand every example shown, whoever it was made on."""
    floor: Tensor | None
    """Those that no network in the accurate one's place could lose, as far as the robust one was attacked."""
    by_source: Mapping[str, Tensor]
    """Those that withstand the examples made on one network or setting."""

    @property
    def count(self) -> Count:
        """How many images are right."""
        return Count(int(self.clean.sum()), int(self.robust.sum()))


@dataclass(frozen=True)
class Curve:
    """The points of a dial on one set of images, from the accurate network to the robust one."""

    points: tuple[Point, ...]
    images: int


class Source(NamedTuple):
    """Who a set of adversarial examples was made on, and by which attack."""

    attack: str
    """Its spelling."""
    network: str
    """One of the two networks, or a setting."""
    cost: Cost | None = None
    """Of an attack that ends where its network is fooled."""


@dataclass(frozen=True)
class Cost:
    """What an attack took: seconds, passes of its network in images, and the accuracy left after each member."""

    seconds: float
    forward: int
    backward: int
    trail: Mapping[str, float]


@dataclass(frozen=True)
class Stage:
    """Attacks on the settings of a dial, on some images; every example made is kept in a file, and made once.

    Args:
        name: `held-out` or `test`.
    """

    name: str
    dial: Dial
    evidence: Evidence
    options: AttackOptions
    folder: Path
    console: Console
    sources: dict[str, Source] = field(default_factory=dict)
    """Of each set of adversarial examples."""

    def attack_members(self, robust: nn.Module, accurate: nn.Module) -> None:
        """Add examples made on the two networks; of the robust one also those of its least margin, for the floor."""
        if self.dial.has_floor:
            self._attack_networks({ON_ROBUST: robust}, MARGIN)
        self._attack_networks({ROBUST_TO_THE_END: robust, ON_ACCURATE: accurate}, TO_THE_END)

    def attack_views(self) -> bool:
        """Add examples made on forms of the robust network that the dial has found; return whether any are new."""
        return self._attack_networks(self.dial.robust_views(), MARGIN)

    def _attack_networks(self, networks: Mapping[str, nn.Module], spelling: str) -> bool:
        attack = parse(spelling, threat=self.evidence.threat)
        new = {name: net for name, net in networks.items() if name not in self.sources}
        with self._counting(new) as advance:
            for name, net in new.items():
                x_adv = craft_examples(
                    net, self.evidence.images, attack, self.options, file=self._file(name, net, attack),
                    advance=lambda done, name=name: advance(name, done),
                )  # fmt: skip
                self._add(name, x_adv, Source(str(attack), name))
        return bool(new)

    def attack_settings(self, settings: Sequence[Setting], attack: Attack) -> None:
        """Add examples made on the networks of settings, and on their surrogates."""
        every = [each for setting in settings for each in (setting, *self.dial.surrogates(setting))]
        names = {name: each for each in every if (name := self.name_of(attack, each)) not in self.sources}
        with self._counting(names) as advance:
            for name, setting in names.items():
                net = self.dial.network(setting)
                file = self._file(name, net, attack)
                if file.exists():
                    advance(name, len(self.evidence))
                else:
                    self._attack(net, attack, file, lambda n, name=name: advance(name, n))
                x_adv = read_examples(file, tuple(self.evidence.sets[CLEAN].shape))
                cost = Cost(**read_checked_json(file.with_suffix(".json"), CostFile, "remove it, and the examples"))
                self._add(name, x_adv, Source(str(attack), str(setting), cost))

    def _add(self, name: str, x_adv: Tensor, source: Source) -> None:
        self.evidence.add(name, x_adv)
        self.sources[name] = source

    def _attack(self, net: nn.Module, attack: Attack, file: Path, advance: Callable[[int], None]) -> None:
        """Attack a network, and write its examples; an interrupted attack is resumed, and another process awaited."""
        state, lock = file.with_name(f".{file.name}.state"), file.with_name(f".{file.name}.lock")
        file.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock):
            if file.exists():  # another process has written it while this one waited
                return
            evaluation = evaluate(
                net, self.evidence.images, [attack], batch_size=self.options.batch_size,
                precision=self.options.precision, seed=self.options.seed, keep_examples=True, state=state,
                advance=lambda name, done: advance(done) if name != CLEAN else None,
            )  # fmt: skip
            x_adv, spelling = evaluation.examples[str(attack)], str(attack)
            cost = Cost(evaluation.seconds[spelling], *evaluation.passes[spelling], evaluation.trails.get(spelling, {}))
            write_checked_json(file.with_suffix(".json"), asdict(cost))
            write_examples(file, x_adv)
            state.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)

    def name_of(self, attack: Attack, setting: Setting) -> str:
        """Return the name of the examples made on a setting's network."""
        return f"{attack} on {setting}"

    def curve(self, settings: Sequence[Setting]) -> Curve:
        """Return what each setting classifies correctly, of all examples that are there."""
        return Curve(tuple(map(self._point, settings)), len(self.evidence))

    def _point(self, setting: Setting) -> Point:
        evidence = self.evidence
        by_source = {name: self.dial.correct(setting, evidence, name) for name in evidence.sets}
        robust = evidence.withstand(by_source.__getitem__)
        floor = self.dial.floor(setting, evidence)
        below = 0 if floor is None else int((floor & ~robust).sum())
        if below:
            raise RuntimeError(f"{setting} loses {below} images that no mix can lose: its floor is wrong")
        return Point(setting, by_source[CLEAN], robust, floor, by_source)

    def _file(self, name: str, net: nn.Module, attack: Attack) -> Path:
        """Return the file of the examples made on a network, named by all that they depend on."""
        versions = environment()["advalign"], environment()["torch"]
        made_by = (self.name, name, str(attack), str(self.evidence.threat), repr(self.options), *versions)
        depends = (*made_by, self.evidence.identity, self.evidence.fingerprint(net), source_digests([attack]))
        return self.folder / f"{self.name}-{digest(*(f'{part} | ' for part in depends), digits=10)}.safetensors"

    @contextmanager
    def _counting(self, names: Iterable[str]) -> Iterator[Callable[[str, int], None]]:
        """Show how far the attack on each network is, and on which images."""
        tasks = {name: f"{self.name}: {name}" for name in names}
        with counting(self.console, list(tasks.values()), len(self.evidence)) as advance:
            yield lambda name, done: advance(tasks[name], done)


def trace(held_out: Stage, attack: Attack, points: int, give: float) -> tuple[Curve, int]:
    """Attack settings on the held-out images; return the best of them as a curve, and the number of the chosen one."""
    dial, evidence = held_out.dial, held_out.evidence
    tried = dial.propose(evidence, points, give)
    for _ in range(ROUNDS):
        if not held_out.attack_views():
            break
        tried = dial.propose(evidence, points, give)
    held_out.attack_views()
    held_out.attack_settings(tried, attack)
    for _ in range(ROUNDS):
        further = [each for each in dial.refine(evidence, points, give) if each not in tried]
        held_out.attack_settings(further, attack)
        tried += further
    ranked = sorted(
        held_out.curve(tried).points,
        key=lambda point: (point.setting == dial.robust, point.setting != dial.accurate, point.count.robust),
    )
    counts = [point.count for point in ranked]
    chosen = choose(counts, len(evidence), give)
    kept = {0, *front(counts, points), chosen, len(counts) - 1}
    curve = tuple(point for number, point in enumerate(ranked) if number in kept)
    return Curve(curve, len(evidence)), curve.index(ranked[chosen])
