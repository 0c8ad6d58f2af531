"""Threat models: what the attacker may do to an image. Images are (N, C, H, W) in [0, 1]; radii are in that unit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from advalign.errors import UserError, quoted, require, unknown
from advalign.runtime import ranks
from advalign.shapes import PerImage
from advalign.spelling import parse_number, spell_number

Pixels = Float[Tensor, "N *shape"]
Norm = Literal["linf", "l2", "l1"]
Projection = Callable[[Tensor], Tensor]
ROUNDING = 1e-6
"""How far pixels of float32 may lie outside [0, 1] by rounding."""
SPREAD = 0.05
"""Share of an image's entries that a step in L1 moves: that with which Croce and Hein (2021) train."""


@dataclass(frozen=True)
class Linf:
    """Every pixel channel may move by at most eps. Madry et al. 2018.

    Example:
        >>> import advalign as aa
        >>> str(aa.Linf(8 / 255))
        'Linf(8/255)'

    Raises:
        UserError: eps is not in [0, 1].
    """

    norm: ClassVar[Norm] = "linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        hint = f"; for images in [0, 1] write {self.eps:g}/255" if 1 < self.eps <= 255 else ""
        require(0 <= self.eps <= 1, lambda: f"linf: eps={self.eps:g} must be in [0, 1]{hint}")

    def __str__(self) -> str:
        return f"Linf({spell_number(self.eps)})"

    def sample(self, x: Pixels) -> Pixels:
        """Draw uniformly from the ball around x, then clamp to [0, 1]."""
        return self.draw(x).clamp_(0, 1)

    def draw(self, x: Pixels) -> Pixels:
        """Draw uniformly from the ball around x, also beyond [0, 1]."""
        return ranks.draw(lambda batch: torch.empty_like(batch).uniform_(-self.eps, self.eps), x).add_(x)

    def ball(self, x: Pixels) -> Projection:
        """Return the projection to the ball around x and to [0, 1]; it works in place."""
        low, high = (x - self.eps).clamp_(min=0), (x + self.eps).clamp_(max=1)
        return lambda x_adv: x_adv.clamp_(low, high)

    def limited(self, delta: Pixels) -> Pixels:
        """Return the perturbation of at most eps that is nearest, wherever the images are."""
        return delta.clamp(-self.eps, self.eps)

    def steepest(self, grad: Pixels) -> Pixels:
        """Return the direction of unit length in which a linear loss with this gradient grows fastest."""
        return grad.sign()

    def distance(self, x_adv: Pixels, x: Pixels) -> PerImage:
        """Return how far each image has moved, in this threat's norm."""
        return (x_adv - x).flatten(1).abs().amax(1)


@dataclass(frozen=True)
class L2:
    """The whole image may move by at most eps in the Euclidean norm.

    Example:
        >>> import advalign as aa
        >>> aa.L2(0.5).eps
        0.5

    Raises:
        UserError: eps is negative or infinite.
    """

    norm: ClassVar[Norm] = "l2"
    eps: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.eps < math.inf, lambda: f"l2: eps={self.eps:g} must be at least 0 and finite")

    def __str__(self) -> str:
        return f"L2({spell_number(self.eps)})"

    def sample(self, x: Pixels) -> Pixels:
        """Draw uniformly from the ball around x, then clamp to [0, 1]."""
        return self.draw(x).clamp_(0, 1)

    def draw(self, x: Pixels) -> Pixels:
        """Draw uniformly from the ball around x, also beyond [0, 1]."""
        direction = self.steepest(ranks.draw(torch.randn_like, x))
        share = ranks.draw(lambda batch: torch.rand(len(batch), device=batch.device, dtype=batch.dtype), x)
        radius = self.eps * share ** (1 / x.shape[1:].numel())
        return x + direction * _per_image(radius, x)

    def ball(self, x: Pixels) -> Projection:
        """Return the projection to the ball around x and then to [0, 1]; it works in place."""
        tiny = torch.finfo(x.dtype).tiny

        def project(x_adv: Tensor) -> Tensor:
            shrink = (self.eps / _length(x_adv.sub_(x)).clamp_min_(tiny)).clamp_max_(1)
            # The clamp cannot leave the ball: x is in [0, 1], so each coordinate only comes nearer to x.
            return x_adv.mul_(_per_image(shrink, x)).add_(x).clamp_(0, 1)

        return project

    def limited(self, delta: Pixels) -> Pixels:
        """Return the perturbation of at most eps that is nearest, wherever the images are."""
        shrink = (self.eps / _length(delta).clamp_min(torch.finfo(delta.dtype).tiny)).clamp_max_(1)
        return delta * _per_image(shrink, delta)

    def steepest(self, grad: Pixels) -> Pixels:
        """Return the direction of unit length in which a linear loss with this gradient grows fastest."""
        # Largest entry to 1 first: a sure model's gradient of 1e-25 has a square that fp32 rounds to 0.
        tiny = torch.finfo(grad.dtype).tiny
        grad = grad / _per_image(grad.flatten(1).abs().amax(1).clamp_min(tiny), grad)
        return grad / _per_image(_length(grad).clamp_min(tiny), grad)

    def distance(self, x_adv: Pixels, x: Pixels) -> PerImage:
        """Return how far each image has moved, in this threat's norm."""
        return _length(x_adv - x)


@dataclass(frozen=True)
class L1:
    """The pixel channels of an image together may move by at most eps.

    Example:
        >>> import advalign as aa
        >>> str(aa.L1(12))
        'L1(12)'

    Raises:
        UserError: eps is negative or infinite.
    """

    norm: ClassVar[Norm] = "l1"
    eps: float = 12.0

    def __post_init__(self) -> None:
        require(0 <= self.eps < math.inf, lambda: f"l1: eps={self.eps:g} must be at least 0 and finite")

    def __str__(self) -> str:
        return f"L1({spell_number(self.eps)})"

    def sample(self, x: Pixels) -> Pixels:
        """Draw uniformly from the ball around x, then clamp to [0, 1]."""
        return self.draw(x).clamp_(0, 1)

    def draw(self, x: Pixels) -> Pixels:
        """Draw uniformly from the ball around x, also beyond [0, 1]."""
        # Of exponential sizes the shares of their sum are uniform on the sphere.
        sizes = ranks.draw(lambda batch: torch.empty_like(batch).exponential_(), x)
        signs = ranks.draw(lambda batch: torch.randint(0, 2, batch.shape, device=batch.device), x).mul_(2).sub_(1)
        share = ranks.draw(lambda batch: torch.rand(len(batch), device=batch.device, dtype=batch.dtype), x)
        radius = self.eps * share ** (1 / x.shape[1:].numel())
        tiny = torch.finfo(x.dtype).tiny
        return x + sizes * signs * _per_image(radius / sizes.flatten(1).sum(1).clamp_min_(tiny), x)

    def ball(self, x: Pixels) -> Projection:
        """Return the projection to the intersection of the ball around x with [0, 1]; it works in place."""
        up, down = 1 - x, x.clone()

        def project(x_adv: Tensor) -> Tensor:
            delta = x_adv.sub_(x)
            moved = _nearest_in_l1(delta.flatten(1), torch.where(delta > 0, up, down).flatten(1), self.eps)
            return x_adv.copy_(moved.view_as(x)).add_(x).clamp_(0, 1)

        return project

    def limited(self, delta: Pixels) -> Pixels:
        """Return the perturbation of at most eps that is nearest, wherever the images are."""
        flat = delta.flatten(1)
        return _nearest_in_l1(flat, torch.full_like(flat, torch.inf), self.eps).view_as(delta)

    def steepest(self, grad: Pixels) -> Pixels:
        """Return the direction of unit length in which a linear loss with this gradient grows fastest: one entry's."""
        flat = grad.flatten(1)
        if not flat.numel():
            return torch.zeros_like(grad)
        largest = flat.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, largest, flat.gather(1, largest).sign()).view_as(grad)

    def distance(self, x_adv: Pixels, x: Pixels) -> PerImage:
        """Return how far each image has moved, in this threat's norm."""
        return (x_adv - x).flatten(1).abs().sum(1)


@dataclass(frozen=True, eq=False)
class PixelLinf:
    """Every pixel channel may move by a radius of its own. Only for the batch whose shape the radii have."""

    norm: ClassVar[Norm] = "linf"
    eps: float
    """The largest radius: the box lies inside Linf(eps)."""
    radii: Pixels
    """(N, C, H, W), each in [0, eps]; who makes them answers for that."""

    def __str__(self) -> str:
        return f"PixelLinf({spell_number(self.eps)})"

    def sample(self, x: Pixels) -> Pixels:
        """Draw uniformly from the box around x, then clamp to [0, 1]."""
        return self.draw(x).clamp_(0, 1)

    def draw(self, x: Pixels) -> Pixels:
        """Draw uniformly from the box around x, also beyond [0, 1]."""
        return ranks.draw(lambda batch: torch.empty_like(batch).uniform_(-1, 1), x).mul_(self.radii).add_(x)

    def ball(self, x: Pixels) -> Projection:
        """Return the projection to the box around x and to [0, 1]; it works in place."""
        low, high = (x - self.radii).clamp_(min=0), (x + self.radii).clamp_(max=1)
        return lambda x_adv: x_adv.clamp_(low, high)

    def limited(self, delta: Pixels) -> Pixels:
        """Return the perturbation within the radii that is nearest, wherever the images are."""
        return delta.clamp(-self.radii, self.radii)

    def steepest(self, grad: Pixels) -> Pixels:
        """Return the direction of unit length in which a linear loss with this gradient grows fastest."""
        return grad.sign()

    def distance(self, x_adv: Pixels, x: Pixels) -> PerImage:
        """Return how far each image has moved, in the norm of Linf."""
        return (x_adv - x).flatten(1).abs().amax(1)


_ROOT_STEPS = 100
"""Steps at most in the search for a root, of which at least 44 halve its bounds."""

Threat = Linf | L2 | L1 | PixelLinf
THREATS: dict[str, type[Linf] | type[L2] | type[L1]] = {"linf": Linf, "l2": L2, "l1": L1}


def make_threat(norm: str, eps: float) -> Threat:
    """Return the threat of a norm's name, `linf`, `l2` or `l1`, and a radius.

    Raises:
        UserError: unknown norm, or a radius out of range.
    """
    if norm not in THREATS:
        raise unknown("norm", norm, THREATS)
    return THREATS[norm](eps)


def parse_threat(text: str) -> Threat:
    """Read a threat as `str(threat)` spells it: `Linf(8/255)`, `L2(0.5)`, `L1(12)`.

    Raises:
        UserError: another text, or a radius out of range.
    """
    name, bracket, radius = text.removesuffix(")").partition("(")
    require(
        bool(bracket) and text.endswith(")"),
        lambda: f"{quoted(text)} is no threat model: write one as in Linf(8/255), L2(0.5), L1(12)",
    )
    return make_threat(name.lower(), parse_number(radius))


def ascent_step(threat: Threat, grad: Pixels) -> Pixels:
    """Return a step of unit length that raises a loss with this gradient: the steepest one, but for L1.

    There the steepest moves one entry, which soon is at its wall; this one moves the twentieth of the entries with the
    largest gradients, all by the same length.
    """
    return sparse_sign(grad, SPREAD) if isinstance(threat, L1) else threat.steepest(grad)


def sparse_sign(grad: Pixels, share: float | PerImage) -> Pixels:
    """Return the signs of the share of each gradient's entries that are largest, scaled to unit length in L1.

    As in Croce and Hein 2021 all entries move that are at least as large as the one at that place, and no zero does.
    """
    flat = grad.flatten(1)
    entries = flat.shape[1]
    place = (torch.as_tensor(1 - share, device=grad.device) * entries).clamp(0, entries - 1).long().expand(len(flat))
    least = flat.abs().sort(1).values.gather(1, place[:, None])
    signs = flat.sign() * (flat.abs() >= least)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(grad)


def shortened(threat: Threat, delta: Pixels, x: Pixels, radii: PerImage) -> Pixels:
    """Return perturbations projected to balls of radii of their own, in a threat's norm, and to [0, 1] around x."""
    each, room = _per_image(radii, x), torch.where(delta > 0, 1 - x, x)
    if isinstance(threat, L1):
        return _nearest_in_l1(delta.flatten(1), room.flatten(1), radii[:, None]).view_as(x)
    if isinstance(threat, L2):
        shrink = (radii / _length(delta).clamp_min(torch.finfo(x.dtype).tiny)).clamp_max(1)
        return delta.sign() * (delta.abs() * _per_image(shrink, x)).minimum(room)
    return delta.sign() * delta.abs().minimum(each).minimum(room)


def check_step_size(owner: str, step_size: float, threat: Threat) -> None:
    """Refuse a step of an attack that is longer than its threat model is wide.

    Raises:
        UserError: it, with a hint where it is in the unit of 8-bit pixels.
    """
    hint = f": for images in [0, 1] write {step_size:g}/255" if step_size >= 0.5 else ""
    crosses = f"{owner}: step_size={step_size:g} crosses the whole of {threat} in a step{hint}"
    require(step_size <= 2 * threat.eps * (1 + 1e-6) or threat.eps == 0, lambda: crosses)


def check_radius(threat: Threat, shape: tuple[int, ...]) -> None:
    """Refuse a radius in L2 or L1 that is longer than any way from one image of a shape (C, H, W) to another.

    Raises:
        UserError: it, with a hint where it may be in the unit of 8-bit pixels.
    """
    if not isinstance(threat, L2 | L1):
        return
    longest = math.sqrt(math.prod(shape)) if isinstance(threat, L2) else math.prod(shape)
    hint = f"; for images in [0, 1] write {threat.eps:g}/255" if threat.eps <= 255 * longest else ""
    require(
        threat.eps <= longest,
        lambda: (
            f"{threat.norm}: eps={threat.eps:g} is more than any two images of shape {shape} differ by, "
            f"{longest:.3g}{hint}"
        ),
    )


def check_images(x: Tensor) -> None:
    """Refuse images outside [0, 1], beyond rounding: normalised inputs would silently change what eps means.

    Raises:
        UserError: the smallest and largest value, and where normalisation belongs; or a type that is no float.
    """
    require(
        x.is_floating_point(),
        lambda: f"images are {str(x.dtype).removeprefix('torch.')}: attacks need floats in [0, 1], x / 255 of uint8",
    )
    if x.is_meta or not x.numel():
        return
    low, high = float(x.detach().min()), float(x.detach().max())
    if not (low >= -_slack(x) and high <= 1 + _slack(x)):
        raise UserError(
            f"images lie in [{_shown(low)}, {_shown(high)}], but attacks need [0, 1]: "
            "normalise inside the model (advalign.models.Normalized), not before it"
        )


def in_unit_range(x: Tensor) -> Tensor:
    """Return images (N, C, H, W) that leave [0, 1] by rounding clamped to it; themselves, if they lie in it.

    Rounding is 1e-6 at most, in half precision the distance from 1 to the next number.

    Raises:
        UserError: as `check_images`.
    """
    check_images(x)
    return x.clamp(0, 1) if x.numel() and bool(((x < 0) | (x > 1)).any()) else x


def _slack(x: Tensor) -> float:
    return max(ROUNDING, torch.finfo(x.dtype).eps) if x.dtype in (torch.float16, torch.bfloat16) else ROUNDING


def _shown(value: float) -> str:
    """Return three digits, or as many as tell the value from a bound that it is not."""
    text = f"{value:.3g}"
    return text if float(text) not in (0, 1) or float(text) == value else f"{value:.9g}"


def require_inside(attack: object, threat: Threat | None, x_adv: Tensor, x: Tensor) -> None:
    """Refuse adversarial images outside [0, 1] or, beyond rounding, outside the threat model; None has no bound.

    Raises:
        UserError: how far an image has moved.
    """
    check_images(x_adv)
    if threat is None or not len(x):
        return
    rounding = max(torch.finfo(x_adv.dtype).eps / 2, 2**-24)  # of each pixel; lengths are sums over all of them
    if isinstance(threat, L2 | L1):
        rounding *= math.sqrt(x[0].numel())
    x_adv, x = (each.detach().to(torch.promote_types(each.dtype, torch.float32)) for each in (x_adv, x))
    moved = float(threat.distance(x_adv, x).max())
    require(
        moved <= threat.eps * (1 + 1e-5) + rounding, lambda: f"{attack} moved an image by {moved:g}, outside {threat}"
    )


def _nearest_in_l1(delta: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """Return the nearest z (N, D) to delta (N, D) with ||z||_1 <= eps, |z_i| <= room_i and the signs of delta.

    A radius for each is (N, 1).

    By the conditions of Karush, Kuhn and Tucker |z_i| = min(max(|delta_i| - t, 0), room_i), with t = 0 or the sum eps.
    That sum falls piecewise linearly with t, so Newton's method finds t, mostly in fewer than ten steps. Where walls
    make it creep, every other step halves the bounds instead.
    """
    size = delta.abs()
    z, low = size.minimum(room), torch.zeros_like(size[:, :1])
    t, high = low, size.amax(1, keepdim=True) if size.shape[1] else low
    near = 8 * torch.finfo(z.dtype).eps * eps
    for step in range(_ROOT_STEPS):
        excess = z.sum(1, keepdim=True) - eps
        low, high = torch.where(excess > 0, t, low), torch.where(excess > 0, high, t)
        ahead = t + excess / ((z > 0) & (z < room)).sum(1, keepdim=True)
        creeps = (ahead < low) | (ahead > high) | (step > 10 and step % 2 == 1)
        ahead = torch.where(creeps, (low + high) / 2, ahead)
        far = (excess > near) | ((t > 0) & (excess < -near))
        if not (far & (ahead != t)).any():
            break
        t = torch.where(far, ahead, t)
        z = (size - t).clamp_(min=0).minimum(room)
    z *= (eps / z.sum(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)).clamp_max_(1)
    return z * delta.sign()


def _length(delta: Pixels) -> PerImage:
    # Not Tensor.norm, which on a CPU errs by 1e-6 on large images: enough to leave the ball.
    return delta.flatten(1).square().sum(1).sqrt()


def _per_image(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
