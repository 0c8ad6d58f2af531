"""Square: random search by square patches, with queries alone. Images (N, C, H, W) in [0, 1]; n of N are left."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advalign.attacks.classification import fooled_in
from advalign.attacks.contract import Attack, attack_survivors
from advalign.attacks.goal import Goal
from advalign.attacks.losses import cross_entropy, margin
from advalign.attacks.pass_counter import PassCounter
from advalign.errors import require
from advalign.shapes import ImageBatch, Labels, Mask
from advalign.threats import L1, L2, Linf

SHRINKS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""After each of these proposals the patches have half the area: the schedule of 10,000 queries, never rescaled."""

Sampler = Callable[..., Tensor]  # (*shape) -> (n, *shape), uniform in [0, 1)


@dataclass(frozen=True)
class Square(Attack):
    """Random search that changes one square a query, and needs no gradient. Andriushchenko et al. 2020.

    As in AutoAttack but for three details. Windows reach the last row and column, as in the paper, which the code
    there leaves out. Each image has a window of its own, and its draws do not depend on when other images are fooled
    and leave the batch; they do depend on its place in the batch. The starting point is one of the queries.

    Args:
        queries: forward passes an image and restart, at most.
        p_init: share of the image's area that the first squares cover.
        loss: what a proposal has to raise: `margin`, or `ce`. One that fools is accepted in any case.

    Raises:
        UserError: queries, restarts or p_init out of range, unknown loss, a threat without a norm.
    """

    name: ClassVar[str] = "square"
    uses_gradients: ClassVar[bool] = False
    always_spelled: ClassVar[str] = "queries"
    queries: int = 5000
    p_init: float = 0.8
    restarts: int = 1
    loss: Literal["margin", "ce"] = "margin"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.p_init <= 1, lambda: f"square: p_init={self.p_init} must be above 0 and at most 1")
        known = isinstance(self.threat, Linf | L2 | L1)
        require(known, lambda: f"square attacks in Linf, L2 and L1, not in {self.threat}")

    def run(self, model: nn.Module, x: ImageBatch, y: Labels) -> ImageBatch:
        """Attack x (N, C, H, W) in [0, 1] with labels y (N,); return adversarial images of that shape and range."""

        def attempt(rows: Tensor) -> Tensor:
            return self._search(model, x[rows], y[rows])

        with torch.no_grad():
            return attack_survivors(model, x, Goal(y), [attempt] * self.restarts, first_on_all=True)

    def area(self, step: int) -> float:
        """Return the share of the image that the squares of a proposal (0 the first) cover."""
        return self.p_init / 2 ** sum(step > shrink for shrink in SHRINKS)

    def _search(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        moves = {"linf": (_stripes, _squares), "l2": (_tiles, _bumps), "l1": (_tiles_l1, _bumps_l1)}
        start, propose = moves[self.threat.norm]
        score = {"margin": margin, "ce": cross_entropy}[self.loss]
        best, highest = x, x.new_full((len(x),), -torch.inf)
        result, rows = x.clone(), torch.arange(len(x), device=x.device)

        def draw(*shape: int) -> Tensor:  # for every image, so that the draws do not depend on which are left
            return torch.rand(len(result), *shape, dtype=x.dtype, device=x.device)[rows]

        answers = _Answers(model)
        for query in range(self.queries):
            if query:
                candidate, place = propose(x, best, self.threat.eps, self.area(query - 1), draw)
                logits = answers.to_proposal(candidate, place, best)
            else:
                candidate = start(x, self.threat.eps, draw)
                logits = model(candidate)
            value, fooled = score(logits, y).to(x.dtype), fooled_in(model, logits, candidate, y)
            better = (value > highest) | fooled
            answers.keep(better)
            best = torch.where(better.view(-1, 1, 1, 1), candidate, best)
            highest = torch.where(better, value, highest)
            if fooled.any():
                result[rows[fooled]] = best[fooled]
                if fooled.all():
                    return result
                still = ~fooled
                x, y, best, highest, rows = x[still], y[still], best[still], highest[still], rows[still]
                answers.take(still)
        result[rows] = best
        return result


class _Place(NamedTuple):
    """Where a proposal differs from the best image."""

    top: Tensor  # (n,)
    left: Tensor
    side: int


class _Answers:
    """The model's logits of proposals, which cost less where it can use that they are known images but for a square."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._run, self._side = model, None, 0

    def to_proposal(self, candidate: Tensor, place: _Place | None, best: Tensor) -> Tensor:
        """Return logits (n, K) of the images (n, C, H, W) which are `best` but for that place."""
        if place is None or not isinstance(self._model, PassCounter):
            return self._model(candidate)
        if place.side != self._side:
            self._run, self._side = self._model.begin_local(best, place.side), place.side
        if self._run is None:
            return self._model(candidate)
        return self._model.propose(self._run, candidate, place.top, place.left)

    def keep(self, accepted: Mask) -> None:
        """Note which of the last proposals (n,) are the best images now."""
        if self._run is not None:
            self._run.keep(accepted)

    def take(self, left: Mask) -> None:
        """Go on with some of the images."""
        if self._run is not None:
            self._run.take(left)


def _stripes(x: Tensor, eps: float, draw: Sampler) -> Tensor:
    """Return x with every column of every channel at one side of the Linf ball."""
    return (x + eps * _signs(draw(x.shape[1], 1, x.shape[3]))).clamp_(0, 1)


def _squares(x: Tensor, best: Tensor, eps: float, area: float, draw: Sampler) -> tuple[Tensor, _Place]:
    """Return the best images with one square, in each channel, at one side of the Linf ball, and where it is.

    What the paper writes, to add 2 eps or take it away and to project, ends there from anywhere in the ball.
    """
    height, width = x.shape[2:]
    side = min(max(round(math.sqrt(area * height * width)), 1), height, width)
    down, across = _offsets(x, side, draw)
    moved = (x + eps * _signs(draw(x.shape[1], 1, 1))).clamp_(0, 1)
    place = _Place(top=-down[:, 0, 0], left=-across[:, 0, 0], side=side)
    return torch.where(_inside(down, across, side), moved, best), place


def _tiles(x: Tensor, eps: float, draw: Sampler) -> Tensor:
    """Return x moved by eps in the L2 norm along a grid of bumps."""
    return _moved(x, _grid(x, _eta, draw), eps)


def _grid(x: Tensor, patch: Callable[..., Tensor], draw: Sampler) -> Tensor:
    """Return bumps, five by five or more, with signs by channel; zero where they leave a rim."""
    channels, height, width = x.shape[1:]
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    signs, turned = _signs(draw(channels, down, across)), draw(1, down, across) < 0.5
    upright, lying = (bump.repeat(down, across) for bump in patch(side, x.dtype, x.device))
    delta = _enlarged(signs, side) * torch.where(_enlarged(turned, side), lying, upright)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    return F.pad(delta, (left, width - across * side - left, top, height - down * side - top))


def _bumps(x: Tensor, best: Tensor, eps: float, area: float, draw: Sampler) -> tuple[Tensor, None]:
    """Return the best images with the length of two windows spent on one, where a bump joins what was there.

    Length in the L2 norm; what clamping has cost is spent there, too. Algorithm 3 of the paper.
    """
    channels, delta = x.shape[1], best - x
    here, there, bump = _two_windows(x, _eta, area, draw)
    old = delta * here
    new = bump * here * _signs(draw(channels, 1, 1)) + old / _length(old)
    spare = (eps**2 - delta.square().sum((1, 2, 3), keepdim=True)).clamp_(min=0) / channels
    length = (spare + (delta * (here | there)).square().sum((2, 3), keepdim=True)).sqrt()
    return _moved(x, torch.where(here, new * (length / _length(new)), delta * ~there), eps), None


def _two_windows(x: Tensor, patch: Callable[..., Tensor], area: float, draw: Sampler) -> tuple[Tensor, Tensor, Tensor]:
    """Place two windows of an odd side in each image; return both masks, and a bump in the first (n, 1, H, W)."""
    height, width = x.shape[2:]
    side = max(round(math.sqrt(area * height * width)), 3)
    side = min(side + 1 - side % 2, height, width)
    i, j = _offsets(x, side, draw)
    here, there = _inside(i, j, side), _inside(*_offsets(x, side, draw), side)
    turned = (draw(1, 1) < 0.5).long()
    return here, there, patch(side, x.dtype, x.device)[turned, i.clamp(0, side - 1), j.clamp(0, side - 1)].unsqueeze(1)


@cache
def _eta(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the patch (2, side, side) of unit length, a hill beside a hollow, and the same lying. Equation 3."""

    def hill(height: int) -> Tensor:
        heights = _hill(height, side, 2, dtype, device)
        return heights / heights.norm().clamp_min(1e-12)  # of 0 rows where the side is 1

    eta = torch.cat([hill(side // 2), -hill(side - side // 2)])
    eta /= eta.norm()
    return torch.stack([eta, eta.T])


@cache
def _eta_l1(side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the same patch (2, side, side) for L1, with steeper hills; as in the authors' code of L1."""

    def hill(height: int) -> Tensor:
        heights = _hill(height, side, 4, dtype, device)
        return heights / heights.sum().clamp_min(1e-12)

    eta = torch.cat([hill(side // 2), -hill(side - side // 2)])
    eta /= eta.abs().sum()
    return torch.stack([eta, eta.T])


def _hill(height: int, side: int, power: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a pyramid (height, side) whose rings rise towards the middle, by the inverse powers of their radii."""
    rows, columns = (torch.arange(n, device=device) - n // 2 for n in (height, side))
    ring = torch.maximum(rows.abs()[:, None], columns.abs()[None, :])
    return torch.arange(side // 2 + 1, 0, -1, device=device, dtype=dtype).pow(-power).cumsum(0).flip(0)[ring]


def _tiles_l1(x: Tensor, eps: float, draw: Sampler) -> Tensor:
    """Return x moved along a grid of bumps, projected to the L1 ball."""
    return L1(eps).ball(x)(x + _grid(x, _eta_l1, draw))


def _bumps_l1(x: Tensor, best: Tensor, eps: float, area: float, draw: Sampler) -> tuple[Tensor, None]:
    """Return the best images with the length of two windows spent on one, in L1; Croce and Hein 2021.

    As their code, which spends it in each channel and leaves to the projection what is too much.
    """
    channels, delta = x.shape[1], best - x
    here, there, bump = _two_windows(x, _eta_l1, area, draw)
    old = delta * here
    new = bump * here * _signs(draw(channels, 1, 1)) + old / _length_l1(old)
    spare = (eps - delta.abs().sum((1, 2, 3), keepdim=True)).clamp_(min=0)
    length = spare + channels * _length_l1(delta * (here | there))
    return L1(eps).ball(x)(x + torch.where(here, new * (length / _length_l1(new)), delta * ~there)), None


def _length_l1(delta: Tensor) -> Tensor:
    """Return the L1 norm of each channel (n, C, 1, 1), never 0."""
    return delta.abs().sum((2, 3), keepdim=True).clamp_(min=1e-12)


def _offsets(x: Tensor, side: int, draw: Sampler) -> tuple[Tensor, Tensor]:
    """Place a window in each image; return how far rows (n, H, 1) and columns (n, 1, W) are from its corner."""
    height, width = x.shape[2:]
    top, left = (draw(1, 1) * (height - side + 1)).long(), (draw(1, 1) * (width - side + 1)).long()
    rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
    return rows[:, None] - top, columns - left


def _inside(i: Tensor, j: Tensor, side: int) -> Tensor:
    """Tell which pixels (n, 1, H, W) lie in the windows of that side, from their offsets."""
    return ((i >= 0) & (i < side) & (j >= 0) & (j < side)).unsqueeze(1)


def _signs(uniform: Tensor) -> Tensor:
    return 2 * (uniform < 0.5).to(uniform.dtype) - 1


def _enlarged(tiles: Tensor, side: int) -> Tensor:
    return tiles.repeat_interleave(side, 2).repeat_interleave(side, 3)


def _length(delta: Tensor) -> Tensor:
    """Return the L2 norm of each channel (n, C, 1, 1), never 0."""
    return delta.square().sum((2, 3), keepdim=True).sqrt_().clamp_(min=1e-12)


def _moved(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    return (x + eps * L2(eps).steepest(delta)).clamp_(0, 1)
