"""The checks behind a diagnosis: each turns numbers into a verdict, and fails only beyond what chance explains.

After Athalye et al. 2018 ("Obfuscated gradients") and Carlini et al. 2019 ("On evaluating adversarial robustness").
Flags are (N,) bool: whether the image withstands; one that is misclassified from the start does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from advalign.threats import ROUNDING

USUAL = 20  # steps of the attack that papers report
RESTARTS = 20  # as much effort as the black-box attack's; with fewer, sound networks look masked in wide L2 balls
DRAWS = 20  # of random noise: as many forward passes as the usual attack has steps

WITHIN_CHANCE = " With so few images this may be chance."
NO_BETTER = 0.1  # of models that guess, the share that is taken for better; see `beats_constant`
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

ADVICE = {
    "input range": "Normalise inside the model: advalign.models.Normalized, or --mean and --std.",
    "eval mode": "Call model.eval(), and look for a train() that ignores it.",
    "logits": "Return logits, and leave the softmax to the loss.",
    "clean accuracy": (
        "Check the weights, the order of the classes, and the range of the images: a network may expect them "
        "normalised, --mean and --std."
    ),
    "determinism": "Attack the expectation over draws and count accuracy over several, or turn off what draws.",
    "batch": "Use running statistics in eval mode.",
    "gradient": "Attack without what flattens the gradient, such as a scale of the logits or a step function.",
    "FGSM and PGD": "Look at the loss surface; try more restarts and other losses.",
    "more steps": "Look at the loss surface; try more restarts and other losses.",
    "convergence": "Report more steps, or more restarts.",
    "large radius": "Do not trust the attack at any radius before it succeeds at this one.",
    "black box": "Report the worst case over both, and attack without the gradient.",
    "members": "Report the worst case over the attacks on the mix and on its members, as `advalign frontier` does.",
    "floor": "Trust the floor; attack the mix with other losses, restarts, and examples of mixes at other settings.",
    "random noise": "Do not trust the attack before it beats noise.",
    "loss": "Report the margin loss or AutoAttack, not cross entropy alone.",
}
"""What to do if a verdict is no pass, by check."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check: its name, the number, and what it means."""

    name: str
    passed: Literal["pass", "warn", "fail"]
    number: float
    unit: str
    sentence: str

    @property
    def advice(self) -> str:
        """What to do, in a sentence; empty where it passed."""
        return "" if self.passed == "pass" else ADVICE[self.name]

    def __str__(self) -> str:
        digits = ".1f" if self.unit.startswith(("%", "points")) else ".3g"
        return f"{self.number:{digits}} {self.unit}".strip()


def warnings_of(verdicts: Iterable[Verdict]) -> list[str]:
    """Return the sentences of those verdicts that make an accuracy doubtful."""
    doubtful = [
        each for each in verdicts if each.passed == "fail" or (each.name, each.passed) == ("clean accuracy", "warn")
    ]
    masked = {"gradient", "black box"}
    return [
        f"{each.sentence} {each.advice}{' Run `advalign diagnose`.' if each.name in masked else ''}"
        for each in doubtful
    ]


def check_range(x: Tensor) -> Verdict:
    """Images are in [0, 1], and use it."""
    low, high = float(x.min()), float(x.max())
    outside = max(-low, high - 1, 0.0) + 0.0  # NaN stays, -0 does not
    lie = f"Pixels lie between {low:.3g} and {high:.3g}"
    if not outside <= ROUNDING:
        text = f"{lie}, not within 0 and 1: the radius has another unit here. Normalise inside the model."
        return Verdict("input range", "fail", outside, "beyond [0, 1]", text)
    if high - low < 0.1:
        return Verdict("input range", "warn", outside, "beyond [0, 1]", f"{lie}: were they divided by 255 twice?")
    return Verdict("input range", "pass", outside, "beyond [0, 1]", f"{lie}.")


def check_mode(training: Sequence[str]) -> Verdict:
    """Every module was in eval mode when the model was given."""
    if not training:
        return Verdict("eval mode", "pass", 0, "modules", "Every module was in eval mode.")
    named = ", ".join(training[:3]) + (", ..." if len(training) > 3 else "")
    text = f"In train mode when handed in: {named}. Dropout and batch statistics falsify attacks."
    return Verdict("eval mode", "fail", len(training), "modules", text + " The rest was done in eval mode.")


def check_outputs(outputs: Tensor, *, mix: bool = False) -> Verdict:
    """Outputs are logits, neither probabilities nor their logarithms, unless of a mix."""
    outputs = outputs.double()
    inside = (outputs >= 0).all(1) & (outputs <= 1 + SUMS).all(1)
    shares = inside & ((outputs.sum(1) - 1).abs() < SUMS)
    logs = (outputs <= SUMS).all(1) & (outputs.logsumexp(1).abs() < SUMS)
    if shares.all():
        text = "Outputs are probabilities: losses take the softmax again, and gradients vanish."
        return Verdict("logits", "fail", 100, "% probabilities", text)
    if logs.all():
        if mix:
            text = "Outputs are the logarithms of mixed probabilities, in float64, so nothing saturates."
            return Verdict("logits", "pass", 100, "% log-probabilities", text)
        text = "Outputs are log-probabilities. Cross entropy and margin are unaffected, other losses may not be."
        return Verdict("logits", "warn", 100, "% log-probabilities", text)
    return Verdict("logits", "pass", 100 * share(shares), "% probabilities", "Outputs are logits.")


def check_clean(right: Tensor, labels: Tensor) -> Verdict:
    """The model classifies better than one that always answers the largest class; attacks on another mean nothing.

    Args:
        right: (N,) bool, whether the image is classified as its label.
        labels: (N,) int64.
    """
    number, count = 100 * share(right), int(right.sum())
    if beats_constant(count, labels):
        return Verdict("clean accuracy", "pass", number, "%", f"Clean accuracy is {format_share(right)}.")
    text = f"Clean accuracy is {format_share(right)}, {no_better(count, labels)}."
    return Verdict("clean accuracy", "warn", number, "%", text)


def beats_constant(right: int, labels: Tensor) -> bool:
    """Return whether a classifier is better than always answering the largest class, which needs no image.

    It is if guesses that are right with the share of that class would get so many images right with a probability below
    `NO_BETTER` (the exact one-sided binomial test). Images too few for the test, so that even a classifier without a
    mistake would not pass, show a classifier as no better only where it is not above that share. Images of one class
    show nothing.

    Args:
        right: how many images are classified as their label.
        labels: (N,) int64, of all images.
    """
    n, largest = len(labels), int(labels.unique(return_counts=True)[1].max())
    if largest == n:
        return True
    p = largest / n
    return right > largest and (tail(right, n, p) < NO_BETTER or tail(n, n, p) >= NO_BETTER)


def no_better(right: int, labels: Tensor) -> str:
    """Say how an accuracy compares with that of the constant answer, for a classifier that does not beat it."""
    largest = int(labels.unique(return_counts=True)[1].max())
    clearly = "clearly " if right > largest else ""
    its_share = 100 * largest / len(labels)
    return f"not {clearly}better than always answering the largest class, {its_share:.1f} % of these images"


def check_determinism(once: Tensor, again: Tensor) -> Verdict:
    """Two forward passes agree."""
    number, flips = _difference(once, again), int((once.argmax(1) != again.argmax(1)).sum())
    if number <= SAME:
        return Verdict("determinism", "pass", number, "of the outputs' spread", "Two forward passes agree.")
    text = f"Two forward passes differ, {flips} of {len(once)} images even in their class: the model draws at random."
    return Verdict("determinism", "fail", number, "of the outputs' spread", text)


def check_batch(small: Tensor, large: Tensor, repeatable: bool) -> Verdict:
    """An image's outputs do not depend on the images beside it."""
    number = _difference(small, large)
    if not repeatable:
        text = "Cannot be checked on a model that draws at random."
        return Verdict("batch", "warn", number, "of the outputs' spread", text)
    if number <= ALONE:
        return Verdict(
            "batch", "pass", number, "of the outputs' spread", "Outputs do not depend on the other images of a batch."
        )
    text = "Outputs depend on the other images of a batch: is a norm using batch statistics?"
    return Verdict("batch", "fail", number, "of the outputs' spread", text)


def check_gradient(gradients: Tensor) -> Verdict:
    """Cross entropy has a gradient at the images."""
    flat = gradients.flatten(1)
    finite = flat.isfinite().all(1)
    dead = ~finite | (flat == 0).all(1)
    count, n = int(dead.sum()), len(dead)
    median = float(flat[finite].double().norm(dim=1).median()) if finite.any() else math.nan
    number = 100 * count / n
    text = f"{count} of {n} images have a zero or non-finite gradient; the median norm is {median:.1e}."
    if tail(count, n, FLAT) < ALPHA:
        text += " Attacks have no direction to follow: the gradient is masked."
        return Verdict("gradient", "fail", number, "% dead", text)
    return Verdict("gradient", "warn" if count else "pass", number, "% dead", text)


def check_fgsm(fgsm: Tensor, pgd: Tensor) -> Verdict:
    """One step is not stronger than twenty steps."""
    number, text = points(pgd, fgsm), f"FGSM leaves {format_share(fgsm)}, PGD-{USUAL} {format_share(pgd)}."
    if clearly_below(fgsm, pgd):
        text += " One large step beats many small ones: the gradient near the image is misleading."
        return Verdict("FGSM and PGD", "fail", number, "points", text)
    if number > 0:
        return Verdict("FGSM and PGD", "warn", number, "points", f"{text} This may be chance.")
    return Verdict("FGSM and PGD", "pass", number, "points", text)


def check_steps(steps: Mapping[int, Tensor]) -> Verdict:
    """More steps are never clearly weaker."""
    pairs = list(combinations(sorted(steps), 2))
    less, more = max(pairs, key=lambda pair: points(steps[pair[1]], steps[pair[0]]))
    number = max(0.0, points(steps[more], steps[less]))
    weaker = next(((a, b) for a, b in pairs if clearly_below(steps[a], steps[b])), None)
    if weaker is None:
        return Verdict("more steps", "pass", number, "points", "More steps are never weaker than fewer, beyond noise.")
    a, b = weaker
    text = (
        f"{a} steps leave {format_share(steps[a])}, {b} steps {format_share(steps[b])}: smaller steps do not get there."
    )
    return Verdict("more steps", "fail", number, "points", text)


def check_convergence(steps: Mapping[int, Tensor], once: Tensor, again: Tensor) -> Verdict:
    """Twenty steps from one start come close to what more steps or more starts achieve."""
    most = max(steps)
    text = f"{USUAL} steps leave {format_share(steps[USUAL])}, {most} steps {format_share(steps[most])}"
    gains = {"steps": (steps[USUAL], steps[most]), "restarts": (once, again)}
    missing = [what for what, (less, more) in gains.items() if _gains(less, more)]
    number = max(points(less, more) for less, more in gains.values())
    text += f"; {RESTARTS} restarts turn {format_share(once)} into {format_share(again)}."
    if missing:
        text += f" The attack has not converged: it needs more {' and '.join(missing)}."
        return Verdict("convergence", "warn", number, "points", text)
    text += WITHIN_CHANCE if number > UNCONVERGED else ""
    return Verdict("convergence", "pass", number, "points", text)


def check_radius(radii: Mapping[float, Tensor], chance: float) -> Verdict:
    """Accuracy falls to about 0 at a radius where every image may become any other."""
    largest = max(radii)
    left = radii[largest]
    number, text = 100 * share(left), f"At radius {largest:.3g} PGD-{USUAL} leaves {format_share(left)}"
    if tail(int(left.sum()), len(left), chance / 2) < ALPHA:
        text += f" (chance: {100 * chance:.3g} %). Any image can be reached there, so it is the attack that fails."
        return Verdict("large radius", "fail", number, "%", text)
    pairs = combinations(sorted(radii), 2)
    if weaker := next(((a, b) for a, b in pairs if clearly_below(radii[a], radii[b])), None):
        a, b = weaker
        text += f"; but {format_share(radii[b])} at {b:.3g}, more than {format_share(radii[a])} at the smaller {a:.3g}."
        return Verdict("large radius", "warn", number, "%", text)
    return Verdict("large radius", "warn" if number > LEFT else "pass", number, "%", f"{text}.")


def check_black_box(white: Tensor, black: Mapping[str, Tensor]) -> Verdict:
    """An attack without the model's gradient breaks nothing that the gradient attacks leave."""
    broken = white & ~torch.stack(list(black.values())).all(0)
    return judge_slips(" and ".join(black), int(broken.sum()), int(white.sum()), len(white))


def judge_slips(black: str, count: int, left: int, n: int) -> Verdict:
    """As `check_black_box`, from counts: of n images `left` withstand gradient attacks, and `count` of these break."""
    number = 100 * count / n
    text = f"{black} broke {count} of the {left} images that gradient attacks leave."
    if tail(count, n, SLIPS) < ALPHA:
        text += " An attack that sees less breaks more: the gradient is masked."
        return Verdict("black box", "fail", number, "%", text)
    return Verdict("black box", "warn" if number > 50 * SLIPS else "pass", number, "%", text)


def check_members(white: Tensor, kept: Tensor) -> Verdict:
    """Of a mix: examples made on one of its two networks break nothing that attacks on the whole leave.

    Args:
        white: withstand the attacks on the mix.
        kept: of those, withstand the examples as well.
    """
    count, n = int((white & ~kept).sum()), len(white)
    text = (
        f"Examples made on its members alone broke {count} of the {int(white.sum())} images that attacks on it leave."
    )
    if tail(count, n, SLIPS) < ALPHA:
        text += " One member hides the other from the gradient."
        return Verdict("members", "fail", 100 * count / n, "%", text)
    return Verdict("members", "warn" if 100 * count / n > 50 * SLIPS else "pass", 100 * count / n, "%", text)


def check_floor(kept: Tensor, certain: Tensor, accurate: Tensor) -> Verdict:
    """Of a mix: it withstands little more than its robust network guarantees, unless the accurate one withstands too.

    Args:
        kept: withstand all attacks.
        certain: would do so whatever network stood in the accurate one's place.
        accurate: what the accurate network by itself withstands.
    """
    number = points(kept, certain)
    text = (
        f"The robust member alone guarantees {format_share(certain)}; {format_share(kept)} withstand, and "
        f"{format_share(accurate)} of the accurate member by itself."
    )
    if number - 100 * share(accurate) > GAP and clearly_below(certain, kept):
        text += " What lies between is what the accurate member adds, or what it hides: an attack has not told which."
        return Verdict("floor", "warn", number, "points", text)
    return Verdict("floor", "pass", number, "points", text)


def check_noise(noise: Tensor, pgd: Tensor, right: Tensor) -> Verdict:
    """Random noise is far weaker than the gradient."""
    by_noise, by_pgd = int((right & ~noise).sum()), int((right & ~pgd).sum())
    number = 100 * by_noise / max(by_pgd, 1)
    text = f"Noise of the same radius, {DRAWS} draws, breaks {by_noise} images, PGD-{USUAL} {by_pgd}."
    if clearly_below(noise, pgd):
        text += " Random noise finds more than the gradient."
        return Verdict("random noise", "fail", number, "% of PGD", text)
    if by_noise > NOISY * by_pgd and max(by_noise, by_pgd) > MATTERS * len(pgd):
        text += " Either the radius is large for these images, or the gradient is of little use."
        return Verdict("random noise", "warn", number, "% of PGD", text)
    if by_noise > NOISY * by_pgd:
        text += f" At most {100 * MATTERS:g} % of the images fall to either: too few to tell."
    return Verdict("random noise", "pass", number, "% of PGD", text)


def check_loss(ce: Tensor, by_margin: Tensor) -> Verdict:
    """The margin loss, which no scale of the logits can flatten, finds little more than cross entropy."""
    number = points(ce, by_margin)
    text = f"PGD-{USUAL} leaves {format_share(ce)} with cross entropy, {format_share(by_margin)} with the margin loss."
    lead = int((ce & ~by_margin).sum()) - int((by_margin & ~ce).sum())
    if lead > 0 and tail(lead, len(ce), WIDE_GAP / 100) < ALPHA:
        text += " Cross entropy saturates: large logits mask its gradient."
        return Verdict("loss", "fail", number, "points", text)
    if number > GAP and clearly_below(by_margin, ce):
        return Verdict("loss", "warn", number, "points", f"{text} The margin loss finds more.")
    text += WITHIN_CHANCE if number > GAP else ""
    return Verdict("loss", "pass", number, "points", text)


def clearly_below(low: Tensor, high: Tensor) -> bool:
    """Return whether fewer images withstand in `low` than in `high`, beyond chance (McNemar's exact one-sided test)."""
    fewer, more = int((high & ~low).sum()), int((low & ~high).sum())
    return fewer > more and tail(fewer, fewer + more, 0.5) < ALPHA


def _gains(less: Tensor, more: Tensor) -> bool:
    return points(less, more) > UNCONVERGED and clearly_below(more, less)


def tail(count: int, n: int, p: float) -> float:
    """Return the probability that `count` or more of n independent events of probability p happen."""
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
        for k in range(count, n + 1)
    )
    return min(1.0, math.fsum(map(math.exp, logs)))


def share(flags: Tensor) -> float:
    """Return the share of images that withstand, in [0, 1]."""
    return float(flags.double().mean())


def points(high: Tensor, low: Tensor) -> float:
    """Return how many percentage points fewer images withstand in the second."""
    return 100 * (share(high) - share(low))


def format_share(flags: Tensor) -> str:
    """Write an accuracy with one standard error of the binomial."""
    part = share(flags)
    return f"{100 * part:.1f} ± {100 * math.sqrt(part * (1 - part) / len(flags)):.1f} %"


def _difference(once: Tensor, again: Tensor) -> float:
    """Return the largest difference in units of the outputs' standard deviation; NaN stays, and passes no bound."""
    spread = once.double().std().clamp_min(1e-30)
    return float((once.double() - again.double()).abs().max() / spread)
