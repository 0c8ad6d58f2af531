"""Can a robust accuracy be trusted? Verdicts on a model, its images and its gradients, each with its number.

`diagnose` gathers the evidence; `advalign.evaluation.checks` turns it into verdicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from advalign.attacks import FGSM, PGD, Attack, parse
from advalign.attacks.classification import classified, in_fp32
from advalign.attacks.losses import cross_entropy, margin
from advalign.attacks.pass_counter import PassCounter
from advalign.data import Images
from advalign.data.images import stratified_split
from advalign.data.pairs import Pair, as_images
from advalign.errors import UserError, require
from advalign.evaluation.checks import (
    DRAWS,
    RESTARTS,
    USUAL,
    Verdict,
    check_batch,
    check_black_box,
    check_clean,
    check_convergence,
    check_determinism,
    check_fgsm,
    check_gradient,
    check_loss,
    check_mode,
    check_noise,
    check_outputs,
    check_radius,
    check_range,
    check_steps,
    share,
)
from advalign.evaluation.diagnose_mix import mix_verdicts
from advalign.evaluation.logits import check_logits, require_finite
from advalign.evaluation.options import AttackOptions
from advalign.evaluation.target import SUBSET_SEED
from advalign.models.adapted import Adapted, adapted
from advalign.models.mix import Mix
from advalign.models.modes import evaluating, outside_inference_mode
from advalign.runtime.seeds import seeded
from advalign.threats import L2, Linf, Threat

N = 500  # images: one standard error of an accuracy is then at most 2.2 points
STEPS = (1, 2, 5, 10, 20, 50, 100)
QUERIES = 1000  # of the black-box attack, for each image that withstands the gradient attacks
PICTURES, GRID = 4, 21  # images whose loss surface is drawn, and points along each direction


@dataclass(frozen=True, eq=False)
class Surfaces:
    """Cross entropy around images, along the gradient's direction and a random one, both of the threat model's norm."""

    offsets: Tensor
    """(G,) along either direction, in radii."""
    loss: Tensor
    """(I, G, G): image, gradient's direction, random direction."""
    margin: Tensor
    """(I, G, G), positive where the image is misclassified."""


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """The verdicts, and the curves behind them.

    Curves are empty if nothing could be attacked: with images outside [0, 1], and with a model that cuts the graph
    between image and logits.
    """

    verdicts: tuple[Verdict, ...]
    n: int
    threat: str
    by_steps: Mapping[int, float]
    """Accuracy in [0, 1] under PGD, by its number of steps."""
    by_radius: Mapping[float, float]
    """Accuracy in [0, 1] under PGD-20, by its radius; at 0 the clean accuracy."""
    surfaces: Surfaces | None

    def __getitem__(self, name: str) -> Verdict:
        return next(verdict for verdict in self.verdicts if verdict.name == name)

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [verdict.name for verdict in self.verdicts if verdict.passed == "fail"]

    def content(self) -> dict[str, Any]:
        """Return everything but the surfaces, as JSON."""
        return {
            "n": self.n,
            "threat": self.threat,
            "verdicts": [
                asdict(verdict)
                | {"number": verdict.number if math.isfinite(verdict.number) else None, "advice": verdict.advice}
                for verdict in self.verdicts
            ],
            "accuracy_by_steps": {str(k): v for k, v in self.by_steps.items()},
            "accuracy_by_radius": {f"{k:g}": v for k, v in self.by_radius.items()},
        }


def diagnose(
    model: Callable[[Tensor], Tensor],
    images: Images | Pair,
    threat: Threat,
    *,
    n: int = N,
    batch_size: int = 512,
    seed: int = 0,
    surrogate: Callable[[Tensor], Tensor] | None = None,
    advance: Callable[[str], None] = lambda step: None,
) -> Diagnosis:
    """Check whether attacks on this model can be believed. The model and the random state are left as they were.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K), on the images' device.
        images: with labels; or a pair of floats (N, C, H, W) and labels (N,), whose range is checked too.
        n: the number of images at most, a stratified draw that is the same for every model.
        surrogate: another network for the same images; examples made on it are a black-box attack on the model.
        advance: called with the name of each step before it begins, for a progress line.

    Raises:
        UserError: no image, a radius of 0, a batch size that is none, or a threat model other than Linf and L2.

    Example:
        >>> import advalign as aa
        >>> net = aa.models.build("small-cnn(width=4)", classes=10, channels=1).eval()
        >>> aa.diagnose(net, aa.data.load("digits").test, aa.Linf(0.1), n=4)["logits"].sentence
        'Outputs are logits.'
    """
    if not isinstance(threat, Linf | L2):
        raise UserError(f"only Linf and L2 can be diagnosed, not {threat}")
    with outside_inference_mode():
        x, y = _subset(images, n)
    require(threat.eps > 0, "eps must be above 0: there is nothing to diagnose at radius 0")
    options = AttackOptions(batch_size=batch_size, seed=seed)
    in_range, network = check_range(x), adapted(model)
    with (
        evaluating(network.net) as in_train_mode,
        torch.autocast(x.device.type, enabled=False),
        seeded(options.seed, "diagnosis"),
    ):
        of_input = [in_range, check_mode(in_train_mode)]
        if in_range.passed == "fail":
            return Diagnosis(tuple(of_input), len(x), str(threat), {}, {}, None)
        bench = _Bench(network, x.clamp(0, 1), y, options.batch_size, options.seed, advance)
        return _diagnose(bench, threat, of_input, None if surrogate is None else adapted(surrogate))


def _diagnose(bench: _Bench, threat: Linf | L2, of_input: list[Verdict], surrogate: nn.Module | None) -> Diagnosis:
    """Check the outputs and gradients, then attack."""
    outputs, half = bench.outputs(), max(1, min(len(bench.x), bench.batch_size) // 2)
    gradients = bench.gradients()
    repeatable = check_determinism(outputs, bench.outputs())
    verdicts = [
        *of_input,
        check_outputs(outputs, mix=isinstance(bench.model.net, Mix)),
        check_clean(bench.right, bench.y),
        repeatable,
        check_batch(bench.outputs(half), outputs, repeatable.passed == "pass"),
        check_gradient(torch.zeros_like(bench.x) if gradients is None else gradients),
    ]
    if gradients is None:  # no attack has anything to follow
        clean = {0.0: share(bench.right)}
        return Diagnosis(tuple(verdicts), len(bench.x), str(threat), {}, clean, None)
    steps, radii, of_attacks = _attack(bench, threat, 1 / outputs.shape[1], surrogate)
    return Diagnosis(
        (*verdicts, *of_attacks),
        len(bench.x),
        str(threat),
        {k: share(flags) for k, flags in steps.items()},
        {eps: share(flags) for eps, flags in radii.items()},
        bench.surfaces(threat, gradients),
    )


def _attack(
    bench: _Bench, threat: Linf | L2, chance: float, surrogate: nn.Module | None
) -> tuple[dict[int, Tensor], dict[float, Tensor], list[Verdict]]:
    """Return which images withstand each number of steps and each radius, and the verdicts on all attacks."""
    fgsm = bench.withstand("fgsm", FGSM(threat))
    steps = {
        k: bench.withstand(f"{k} steps", PGD(threat, steps=k, step_size=min(2.5 / k, 2) * threat.eps)) for k in STEPS
    }
    radii = {0.0: bench.right}
    for eps in _radii(threat, bench.x):
        radii[eps] = bench.withstand(f"radius {eps:.3g}", PGD(replace(threat, eps=eps), steps=USUAL))
    by_margin = bench.withstand("margin loss", PGD(threat, steps=USUAL, loss="margin"))
    noise = bench.withstand("random noise", Noise(threat))

    usual = radii[threat.eps]
    again = bench.withstand("restarts", PGD(threat, steps=USUAL, restarts=RESTARTS), among=usual)
    white = torch.stack([fgsm, by_margin, again, *steps.values()]).all(0)
    square = parse(f"square(queries={QUERIES})", threat=threat)
    black = {"Square": bench.withstand("black box", square, among=white)}
    if surrogate is not None:
        with evaluating(surrogate):
            black["transfer"] = bench.withstand("transfer", FromSurrogate(threat, surrogate), among=white)
    verdicts = [
        check_fgsm(fgsm, usual),
        check_steps(steps),
        check_convergence(steps, usual, again),
        check_radius(radii, chance),
        check_black_box(white, black),
        check_noise(noise, usual, bench.right),
        check_loss(usual, by_margin),
    ]
    if isinstance(bench.model.net, Mix):
        verdicts += mix_verdicts(bench.model.net, bench.x, bench.y, threat, white, bench.withstand)
    return steps, radii, verdicts


@dataclass(frozen=True)
class Noise(Attack):
    """Random noise on the sphere of the threat model (for Linf its corners); the first draw that fools the model."""

    name: ClassVar[str] = "noise"
    uses_gradients: ClassVar[bool] = False
    always_spelled: ClassVar[str] = "draws"
    draws: int = DRAWS

    @torch.no_grad()
    def run(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
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
class FromSurrogate(Attack):
    """The examples that PGD makes on another network, to its last step."""

    name: ClassVar[str] = "transfer"
    uses_gradients: ClassVar[bool] = False
    surrogate: nn.Module | None = None

    def run(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return adversarial images of the surrogate; the model is not used."""
        assert self.surrogate is not None
        return PGD(self.threat, steps=USUAL).to_the_end(self.surrogate, x, y)


class _Bench:
    """A model in eval mode on its images, in batches."""

    def __init__(
        self, model: Adapted, x: Tensor, y: Tensor, batch_size: int, seed: int, advance: Callable[[str], None]
    ) -> None:
        self.model, self.x, self.y, self.batch_size, self.seed, self.advance = model, x, y, batch_size, seed, advance
        self.fast = PassCounter(model)
        outputs = self.outputs()
        require_finite(outputs)
        self.right = classified(outputs, y)

    def outputs(self, batch_size: int | None = None) -> Tensor:
        size = batch_size or self.batch_size
        batches = zip(self.x.split(size), self.y.split(size), strict=True)
        with torch.no_grad(), in_fp32(self.x.device):
            return torch.cat([check_logits(self.model(x), y) for x, y in batches]).float()

    def gradients(self) -> Tensor | None:
        """Return the gradient of each image's cross entropy by the image; None if the model cuts the graph."""
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

    def withstand(self, step: str, attack: Attack, among: Tensor | None = None) -> Tensor:
        """Return (N,) bool: whether the image is classified correctly, also after the attack if it is among these."""
        self.advance(step)
        result = (self.right if among is None else among).clone()
        rows = result.nonzero().squeeze(1)
        with seeded(self.seed):  # every attack from the same random start: less noise between them
            for part in rows.split(self.batch_size) if len(rows) else ():
                x, y = self.x[part], self.y[part]
                x_adv = attack(self.fast, x, y)
                with torch.no_grad(), in_fp32(x.device):
                    result[part] = classified(self.model(x_adv), y)
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


def _subset(images: Images | Pair, n: int) -> tuple[Tensor, Tensor]:
    pictures = as_images(images)
    require(n >= 1, lambda: f"n={n} must be at least 1")
    if n >= len(pictures):
        return pictures.floats(), pictures.labels
    rows = stratified_split(pictures.labels, n, SUBSET_SEED)[1].to(pictures.labels.device)
    return pictures.floats(rows), pictures.labels[rows]


def _radii(threat: Linf | L2, x: Tensor) -> list[float]:
    """Return 1/4, 1/2, 1, 2, ... times the radius, and last the radius at which every image can be reached."""
    reach = 1.0 if isinstance(threat, Linf) else math.sqrt(x[0].numel())
    doublings = [threat.eps * 2.0**k for k in range(-2, 40)]
    return sorted({*(eps for eps in doublings if eps < reach), reach, min(threat.eps, reach)})
