"""Is a robust accuracy to be trusted? Verdicts on a model, its images and its gradients, each with its number.

After Athalye et al. 2018 ("Obfuscated gradients") and Carlini et al. 2019 ("On evaluating adversarial robustness").
`diagnose` gathers the evidence; the `check_...` functions judge it. A difference fails only beyond sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from advalign.attacks import FGSM, PGD, Attack, parse
from advalign.attacks.losses import cross_entropy, margin
from advalign.data import Images
from advalign.data.images import stratified_split
from advalign.errors import UserError, require
from advalign.models.fold import Folded
from advalign.models.modes import buffers_kept, evaluating
from advalign.runtime import seeded
from advalign.threats import L2, Linf, Threat

N = 500  # images: one standard error of an accuracy is then at most 2.2 points
SUBSET_SEED = 0  # that of `evaluate`: the same images for every model
STEPS = (1, 2, 5, 10, 20, 50, 100)
USUAL = 20  # steps of the attack that papers report
RESTARTS = 20  # for what one start leaves: effort like the black box's, or wide L2 balls look masked in honest networks
DRAWS = 20  # of random noise: as many forward passes as the usual attack has steps
QUERIES = 1000  # of the black-box attack; only images that withstand the gradient attacks are asked about
PICTURES, GRID = 4, 21  # images whose loss surface is drawn, and points along each direction

ALPHA = 0.001  # false alarms: a dozen tests a diagnosis make about one in a hundred
SAME = 1e-4  # of the outputs' spread, between two passes; GPU kernels that add in another order stay below
ALONE = 1e-2  # the same between batch sizes, where other kernels run, in TF32 too
SUMS = 1e-3  # how near to 1 a row of probabilities sums, in half precision too
FLAT = 0.01  # share of zero gradients; honest networks have none, dead ones a few
UNCONVERGED = 1.0  # points from 20 to 100 steps, or by restarts: what papers compare differs by less
LEFT = 2.0  # per cent at the largest radius, where every image may become any other
SLIPS = 0.02  # share that only the black box breaks; honest networks on digits show up to 1 % at the restarts above
NOISY = 0.5  # share of the gradient attack's successes that noise has too; where it matters, as below
MATTERS = 0.05  # share of images that the gradient attack breaks
GAP, WIDE_GAP = 5.0, 10.0  # points, CE to margin; CIFAR-10, PGD-20 to AutoAttack: 3 to 5, MART 6 to 8


@dataclass(frozen=True)
class Verdict:
    """One answer: what was looked at, the number, and what it means."""

    name: str
    passed: Literal["pass", "warn", "fail"]
    number: float
    unit: str
    sentence: str

    def __str__(self) -> str:
        digits = ".1f" if self.unit.startswith(("%", "points")) else ".3g"
        return f"{self.number:{digits}} {self.unit}".strip()


@dataclass(frozen=True, eq=False)
class Surfaces:
    """Cross entropy around images, along the gradient's direction and a random one, both of the threat's norm."""

    offsets: Tensor
    """(G,) along either direction, in radii."""
    loss: Tensor
    """(I, G, G): image, gradient's direction, random direction."""
    margin: Tensor
    """(I, G, G), positive where the image has left its class."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The verdicts, and the curves behind them; curves are empty where nothing could be attacked.

    That is so with images outside [0, 1], and with a model that cuts the graph between image and logits.
    """

    verdicts: tuple[Verdict, ...]
    n: int
    threat: str
    by_steps: Mapping[int, float]
    """Accuracy in [0, 1] under PGD with so many steps."""
    by_radius: Mapping[float, float]
    """Accuracy in [0, 1] under PGD-20 with this radius; at 0 the clean one."""
    surfaces: Surfaces | None

    def __getitem__(self, name: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.name == name)

    @property
    def failed(self) -> list[str]:
        """The names of the verdicts that failed."""
        return [verdict.name for verdict in self.verdicts if verdict.passed == "fail"]

    def content(self) -> dict[str, Any]:
        """Return what goes into JSON: all but the surfaces."""
        return {
            "n": self.n,
            "threat": self.threat,
            "verdicts": [
                asdict(verdict) | {"number": verdict.number if math.isfinite(verdict.number) else None}
                for verdict in self.verdicts
            ],
            "accuracy_by_steps": {str(k): v for k, v in self.by_steps.items()},
            "accuracy_by_radius": {f"{k:g}": v for k, v in self.by_radius.items()},
        }


def diagnose(
    model: nn.Module,
    images: Images | tuple[Tensor, Tensor],
    threat: Threat,
    *,
    n: int = N,
    batch_size: int = 512,
    seed: int = 0,
    surrogate: nn.Module | None = None,
    advance: Callable[[str], None] = lambda what: None,
) -> Diagnosis:
    """Tell whether attacks can be believed on this model. It and the random state are left as they were.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K), on the images' device.
        images: with labels; as a pair of floats (N, C, H, W) and labels (N,), their range is looked at too.
        n: on at most this many images, a stratified draw that is the same for every model.
        surrogate: another network for the same images; what fools it is tried on the model as a black-box attack.
        advance: called with what is going to be done next, for a progress line.

    Raises:
        UserError: no image, a radius of 0, a batch size below 1, another threat than Linf and L2.
    """
    if not isinstance(threat, Linf | L2):
        raise UserError(f"only Linf and L2 can be diagnosed, not {threat}")
    x, y = _subset(images, n)
    require(threat.eps > 0, "eps must be above 0: there is nothing to diagnose at radius 0")
    require(batch_size >= 1, f"batch_size={batch_size} must be at least 1")
    first = [check_range(x), check_mode([name or "the model" for name, m in model.named_modules() if m.training])]
    if first[0].passed == "fail":
        return Diagnosis(tuple(first), len(x), str(threat), {}, {}, None)
    with evaluating(model), buffers_kept(model), seeded(seed, "diagnosis"):
        bench = _Bench(model, x, y, batch_size, seed, advance)
        return _diagnosis(bench, threat, first, surrogate)


def _diagnosis(bench: _Bench, threat: Linf | L2, first: list[Verdict], surrogate: nn.Module | None) -> Diagnosis:
    outputs, half = bench.outputs(), max(1, min(len(bench.x), bench.batch_size) // 2)
    chance = 1 / outputs.shape[1]
    gradients = bench.gradients()
    repeatable = check_determinism(outputs, bench.outputs())
    looked_at = [
        *first,
        check_outputs(outputs),
        check_clean(bench.right, chance),
        repeatable,
        check_batch(bench.outputs(half), outputs, repeatable.passed == "pass"),
        check_gradient(torch.zeros_like(bench.x) if gradients is None else gradients),
    ]
    if gradients is None:  # there is nothing that an attack could follow
        clean = {0.0: _share(bench.right)}
        return Diagnosis(tuple(looked_at), len(bench.x), str(threat), {}, clean, None)

    fgsm = bench.withstand("fgsm", FGSM(threat))
    steps = {k: bench.withstand(f"{k} steps", PGD(threat, steps=k, step_size=2.5 * threat.eps / k)) for k in STEPS}
    radii = {0.0: bench.right}
    for eps in _radii(threat, bench.x):
        radii[eps] = bench.withstand(f"radius {eps:.3g}", PGD(replace(threat, eps=eps), steps=USUAL))
    by_margin = bench.withstand("margin loss", PGD(threat, steps=USUAL, loss="margin"))
    noise = bench.withstand("random noise", Noise(threat, DRAWS))

    usual = radii[threat.eps]
    again = bench.withstand("restarts", PGD(threat, steps=USUAL, restarts=RESTARTS), among=usual)
    white = torch.stack([fgsm, by_margin, again, *steps.values()]).all(0)
    square = parse(f"square(queries={QUERIES})", threat=threat)
    black = {"Square": bench.withstand("black box", square, among=white)}
    if surrogate is not None:
        with evaluating(surrogate), buffers_kept(surrogate):
            transfer = Transfer(PGD(threat, steps=USUAL, until_fooled=False), surrogate)
            black["transfer"] = bench.withstand("transfer", transfer, among=white)
    verdicts = (
        *looked_at,
        check_fgsm(fgsm, usual),
        check_steps(steps),
        check_convergence(steps, usual, again),
        check_radius(radii, chance),
        check_black_box(white, black),
        check_noise(noise, usual, bench.right),
        check_loss(usual, by_margin),
    )
    return Diagnosis(
        verdicts,
        len(bench.x),
        str(threat),
        {k: _share(flags) for k, flags in steps.items()},
        {k: _share(flags) for k, flags in radii.items()},
        bench.surfaces(threat, gradients),
    )


# The judges. Flags are (N,) bool: the image withstands; one that is misclassified from the start does not.


def check_range(x: Tensor) -> Verdict:
    """Images are in [0, 1], and use it."""
    low, high = float(x.min()), float(x.max())
    outside = max(-low, high - 1, 0.0) + 0.0  # NaN stays, -0 does not
    lie = f"Pixels lie between {low:.3g} and {high:.3g}"
    if not outside <= 0:
        text = f"{lie}, not within 0 and 1: a radius means something else here. Normalise inside the model."
        return Verdict("input range", "fail", outside, "outside", text)
    if high - low < 0.1:
        return Verdict("input range", "warn", outside, "outside", f"{lie}: were they divided by 255 twice?")
    return Verdict("input range", "pass", outside, "outside", f"{lie}.")


def check_mode(training: Sequence[str]) -> Verdict:
    """No module was handed in in train mode."""
    if not training:
        return Verdict("eval mode", "pass", 0, "modules", "Every module was in eval mode.")
    named = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
    text = f"In train mode when handed in: {named}. Dropout and batch statistics falsify attacks: call model.eval()."
    return Verdict("eval mode", "fail", len(training), "modules", text + " What follows was done in eval mode.")


def check_outputs(outputs: Tensor) -> Verdict:
    """Outputs are logits, neither probabilities nor their logarithms."""
    outputs = outputs.double()
    inside = (outputs >= 0).all(1) & (outputs <= 1 + SUMS).all(1)
    shares = inside & ((outputs.sum(1) - 1).abs() < SUMS)
    logs = (outputs <= SUMS).all(1) & (outputs.logsumexp(1).abs() < SUMS)
    if shares.all():
        text = "Outputs are probabilities: losses take the softmax again, and gradients vanish. Return logits."
        return Verdict("logits", "fail", 100, "% probabilities", text)
    if logs.all():
        text = "Outputs are log-probabilities. Cross entropy and margin do not mind, other losses may: return logits."
        return Verdict("logits", "warn", 100, "% log-probabilities", text)
    return Verdict("logits", "pass", 100 * _share(shares), "% probabilities", "Outputs are logits.")


def check_clean(right: Tensor, chance: float) -> Verdict:
    """The model classifies: an attack on one that guesses says nothing."""
    number = 100 * _share(right)
    if _tail(int(right.sum()), len(right), chance) < ALPHA:
        return Verdict("clean accuracy", "pass", number, "%", f"Clean accuracy is {_spelled(right)}.")
    text = f"Clean accuracy is {_spelled(right)}, no better than guessing: are these the model's classes and data?"
    return Verdict("clean accuracy", "warn", number, "%", text)


def check_determinism(once: Tensor, again: Tensor) -> Verdict:
    """Two forward passes agree."""
    number, flips = _difference(once, again), int((once.argmax(1) != again.argmax(1)).sum())
    if number <= SAME:
        return Verdict("determinism", "pass", number, "of spread", "Two forward passes agree.")
    text = (
        f"Two forward passes differ, {flips} of {len(once)} images even in their class: the model draws at random. "
        "An attack has to average its gradient over draws, and accuracy is to be counted over several."
    )
    return Verdict("determinism", "fail", number, "of spread", text)


def check_batch(small: Tensor, large: Tensor, repeatable: bool) -> Verdict:
    """An image's outputs do not depend on the images beside it."""
    number = _difference(small, large)
    if not repeatable:
        text = "Not to be told for a model that draws at random."
        return Verdict("batch", "warn", number, "of spread", text)
    if number <= ALONE:
        return Verdict("batch", "pass", number, "of spread", "Outputs do not depend on the other images of a batch.")
    text = "Outputs depend on the other images of a batch: is a norm using batch statistics?"
    return Verdict("batch", "fail", number, "of spread", text)


def check_gradient(gradients: Tensor) -> Verdict:
    """Cross entropy has a gradient at the images."""
    flat = gradients.flatten(1)
    finite = flat.isfinite().all(1)
    dead = ~finite | (flat == 0).all(1)
    count, n = int(dead.sum()), len(dead)
    median = float(flat[finite].double().norm(dim=1).median()) if finite.any() else math.nan
    number = 100 * count / n
    text = f"{count} of {n} images have a zero or non-finite gradient; the median norm is {median:.1e}."
    if _tail(count, n, FLAT) < ALPHA:
        text += " Attacks cannot see where to go: the gradient is masked."
        return Verdict("gradient", "fail", number, "% dead", text)
    return Verdict("gradient", "warn" if count else "pass", number, "% dead", text)


def check_fgsm(fgsm: Tensor, pgd: Tensor) -> Verdict:
    """One step is not stronger than twenty."""
    number, text = _points(pgd, fgsm), f"FGSM leaves {_spelled(fgsm)}, PGD-{USUAL} {_spelled(pgd)}."
    if clearly_below(fgsm, pgd):
        text += " One large step beats many small ones: the gradient near the image leads astray."
        return Verdict("FGSM and PGD", "fail", number, "points", text)
    return Verdict("FGSM and PGD", "warn" if number > 0 else "pass", number, "points", text)


def check_steps(steps: Mapping[int, Tensor]) -> Verdict:
    """More steps are never clearly weaker."""
    pairs = list(combinations(sorted(steps), 2))
    less, more = max(pairs, key=lambda pair: _points(steps[pair[1]], steps[pair[0]]))
    number = max(0.0, _points(steps[more], steps[less]))
    weaker = next(((a, b) for a, b in pairs if clearly_below(steps[a], steps[b])), None)
    if weaker is None:
        return Verdict("more steps", "pass", number, "points", "More steps are never weaker than fewer, beyond noise.")
    a, b = weaker
    text = f"{a} steps leave {_spelled(steps[a])}, {b} steps {_spelled(steps[b])}: smaller steps lose their way."
    return Verdict("more steps", "fail", number, "points", text)


def check_convergence(steps: Mapping[int, Tensor], once: Tensor, again: Tensor) -> Verdict:
    """Twenty steps from one start come near to what more steps or more starts reach."""
    most = max(steps)
    text = f"{USUAL} steps leave {_spelled(steps[USUAL])}, {most} steps {_spelled(steps[most])}"
    gains = {"steps": (steps[USUAL], steps[most]), "restarts": (once, again)}
    missing = [what for what, (less, more) in gains.items() if _gains(less, more)]
    number = max(_points(less, more) for less, more in gains.values())
    text += f"; {RESTARTS} restarts turn {_spelled(once)} into {_spelled(again)}."
    if missing:
        text += f" The attack has not converged: report more {' and '.join(missing)}."
        return Verdict("convergence", "warn", number, "points", text)
    return Verdict("convergence", "pass", number, "points", text)


def check_radius(radii: Mapping[float, Tensor], chance: float) -> Verdict:
    """Accuracy falls to about 0 where every image may become any other."""
    largest = max(radii)
    left = radii[largest]
    number, text = 100 * _share(left), f"At radius {largest:.3g} PGD-{USUAL} leaves {_spelled(left)}"
    if _tail(int(left.sum()), len(left), chance / 2) < ALPHA:
        text += f" (chance: {100 * chance:.3g} %). There any image can be reached: it is the attack that fails."
        return Verdict("large radius", "fail", number, "%", text)
    pairs = combinations(sorted(radii), 2)
    if weaker := next(((a, b) for a, b in pairs if clearly_below(radii[a], radii[b])), None):
        a, b = weaker
        text += f"; but {_spelled(radii[b])} at {b:.3g}, more than {_spelled(radii[a])} at the smaller {a:.3g}."
        return Verdict("large radius", "warn", number, "%", text)
    return Verdict("large radius", "warn" if number > LEFT else "pass", number, "%", f"{text}.")


def check_black_box(white: Tensor, black: Mapping[str, Tensor]) -> Verdict:
    """An attack without the model's gradient breaks nothing that the gradient attacks leave."""
    broken = white & ~torch.stack(list(black.values())).all(0)
    count, n = int(broken.sum()), len(white)
    number = 100 * count / n
    text = f"{' and '.join(black)} broke {count} of the {int(white.sum())} images that gradient attacks leave."
    if _tail(count, n, SLIPS) < ALPHA:
        text += " Who sees less breaks more: the gradient is masked."
        return Verdict("black box", "fail", number, "%", text)
    return Verdict("black box", "warn" if number > 50 * SLIPS else "pass", number, "%", text)


def check_noise(noise: Tensor, pgd: Tensor, right: Tensor) -> Verdict:
    """Random noise is far weaker than the gradient."""
    by_noise, by_pgd = int((right & ~noise).sum()), int((right & ~pgd).sum())
    number = 100 * by_noise / max(by_pgd, 1)
    text = f"Noise of the same radius, {DRAWS} draws, breaks {by_noise} images, PGD-{USUAL} {by_pgd}."
    if clearly_below(noise, pgd):
        text += " Chance finds more than the gradient."
        return Verdict("random noise", "fail", number, "% of PGD", text)
    if by_noise > NOISY * by_pgd and by_pgd > MATTERS * len(pgd):
        text += " Either the radius is large for these images, or the gradient says little."
        return Verdict("random noise", "warn", number, "% of PGD", text)
    return Verdict("random noise", "pass", number, "% of PGD", text)


def check_loss(ce: Tensor, by_margin: Tensor) -> Verdict:
    """The margin, which no scale of the logits can flatten, finds little more than cross entropy."""
    number = _points(ce, by_margin)
    text = f"PGD-{USUAL} leaves {_spelled(ce)} with cross entropy, {_spelled(by_margin)} with the margin loss."
    lead = int((ce & ~by_margin).sum()) - int((by_margin & ~ce).sum())
    if lead > 0 and _tail(lead, len(ce), WIDE_GAP / 100) < ALPHA:
        text += " Cross entropy saturates: large logits mask its gradient. Do not report CE attacks alone."
        return Verdict("loss", "fail", number, "points", text)
    if number > GAP and clearly_below(by_margin, ce):
        return Verdict("loss", "warn", number, "points", f"{text} Report the margin loss too.")
    return Verdict("loss", "pass", number, "points", text)


def clearly_below(low: Tensor, high: Tensor) -> bool:
    """Tell whether fewer images withstand in `low` than in `high`, beyond chance: McNemar's test, exact, one-sided."""
    fewer, more = int((high & ~low).sum()), int((low & ~high).sum())
    return fewer > more and _tail(fewer, fewer + more, 0.5) < ALPHA


def _gains(less: Tensor, more: Tensor) -> bool:
    return _points(less, more) > UNCONVERGED and clearly_below(more, less)


def _tail(count: int, n: int, p: float) -> float:
    """Return the chance of `count` or more of n that happen with probability p each."""
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(count, n + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())


def _points(high: Tensor, low: Tensor) -> float:
    return 100 * (_share(high) - _share(low))


def _spelled(flags: Tensor) -> str:
    """Spell an accuracy with one standard error of the binomial."""
    share = _share(flags)
    return f"{100 * share:.1f} ± {100 * math.sqrt(share * (1 - share) / len(flags)):.1f} %"


def _difference(once: Tensor, again: Tensor) -> float:
    """Return the largest difference in units of the outputs' standard deviation; NaN, which no bound allows, stays."""
    spread = once.double().std().clamp_min(1e-30)
    return float((once.double() - again.double()).abs().max() / spread)


# The evidence.


@dataclass(frozen=True)
class Noise:
    """Random noise on the threat's sphere (for Linf its corners), the first draw that fools."""

    name: ClassVar[str] = "noise"
    bounded: ClassVar[bool] = True
    threat: Linf | L2
    draws: int

    @torch.no_grad()
    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return noisy images inside the ball and in [0, 1]."""
        result, project = x.clone(), self.threat.ball(x)
        fooled = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        for _ in range(self.draws):
            noisy = project(x + self.threat.eps * self.threat.steepest(torch.randn_like(x)))
            new = ~fooled & (model(noisy).argmax(1) != y)
            result[new] = noisy[new]
            fooled |= new
        return result


@dataclass(frozen=True)
class Transfer:
    """What an attack makes on another network."""

    name: ClassVar[str] = "transfer"
    bounded: ClassVar[bool] = True
    attack: PGD
    surrogate: nn.Module

    @property
    def threat(self) -> Any:
        """The attack's."""
        return self.attack.threat

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial images of the surrogate; the model is not asked."""
        return self.attack(self.surrogate, x, y)


class _Bench:
    """A model in eval mode on its images, in batches."""

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, batch_size: int, seed: int, advance: Callable[[str], None]
    ) -> None:
        self.model, self.x, self.y, self.batch_size, self.seed, self.advance = model, x, y, batch_size, seed, advance
        self.fast = Folded(model)
        self.right = self.outputs().argmax(1) == y

    @torch.no_grad()
    def outputs(self, batch_size: int | None = None) -> Tensor:
        return torch.cat([self.model(x) for x in self.x.split(batch_size or self.batch_size)]).float()

    def gradients(self) -> Tensor | None:
        """Return the gradient of each image's cross entropy by the image; None where the model cuts the graph."""
        self.advance("gradient")
        parts = []
        for x, y in zip(self.x.split(self.batch_size), self.y.split(self.batch_size), strict=True):
            leaf = x.clone().requires_grad_()
            with torch.enable_grad():
                loss = cross_entropy(self.model(leaf), y).sum()
            (grad,) = torch.autograd.grad(loss, leaf, allow_unused=True) if loss.requires_grad else (None,)
            if grad is None:
                return None
            parts.append(grad)
        return torch.cat(parts)

    def withstand(self, what: str, attack: Attack, among: Tensor | None = None) -> Tensor:
        """Return (N,) bool: classified correctly, and, where it is among these, after the attack too."""
        self.advance(what)
        result = (self.right if among is None else among).clone()
        rows = result.nonzero().squeeze(1)
        with seeded(self.seed):  # every attack from the same random start: less noise between them
            for part in rows.split(self.batch_size) if len(rows) else ():
                x, y = self.x[part], self.y[part]
                x_adv = attack(self.fast, x, y)
                # A hair's breadth for rounding in fp32; NaN, from a gradient that is not finite, passes here.
                outside = bool(
                    ((x_adv < 0) | (x_adv > 1)).any()
                    or (attack.threat.distance(x_adv, x) > attack.threat.eps + 1e-5).any()
                )
                require(not outside, f"{what}: {attack.name} left {attack.threat} or the range of images")
                with torch.no_grad():
                    wrong = self.model(x_adv).argmax(1) != y
                result[part] = ~(wrong & x_adv.isfinite().flatten(1).all(1))  # an attack lost in NaN has failed
        return result

    @torch.no_grad()
    def surfaces(self, threat: Linf | L2, gradients: Tensor) -> Surfaces:
        """Return the loss around the first images that are classified correctly."""
        self.advance("loss surface")
        rows = self.right.nonzero().squeeze(1)[:PICTURES]
        offsets = torch.linspace(-2, 2, GRID, device=self.x.device)
        ahead, aside = threat.steepest(gradients[rows]), threat.steepest(torch.randn_like(self.x[rows]))
        shape = (-1, *[1] * (self.x.ndim - 1))
        losses, margins = [], []
        for k, row in enumerate(rows):
            for a in offsets:
                x = self.x[row] + threat.eps * (a * ahead[k] + offsets.view(shape) * aside[k])
                logits, y = self.model(x.clamp_(0, 1)).float(), self.y[row].expand(GRID)
                losses.append(cross_entropy(logits, y))
                margins.append(margin(logits, y))
        square = (len(rows), GRID, GRID)
        empty = [offsets.new_zeros(0)]
        both = [torch.cat(values or empty).view(square).cpu() for values in (losses, margins)]
        return Surfaces(offsets.cpu(), *both)


def _subset(images: Images | tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
    x, y = (images.floats(), images.labels) if isinstance(images, Images) else images
    require(len(x) > 0, "there are no images to diagnose on")
    require(n >= 1, f"n={n} must be at least 1")
    if n < len(x):
        rows = stratified_split(y, n, SUBSET_SEED)[1].to(y.device)
        x, y = x[rows], y[rows]
    return x.detach(), y


def _radii(threat: Linf | L2, x: Tensor) -> list[float]:
    """Return a quarter, half, once, twice, ... the radius, and last that from which every image can be reached."""
    reach = 1.0 if isinstance(threat, Linf) else math.sqrt(x[0].numel())
    doublings = [threat.eps * 2.0**k for k in range(-2, 40)]
    return sorted({*(eps for eps in doublings if eps < reach), reach, min(threat.eps, reach)})
