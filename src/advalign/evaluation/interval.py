"""How sure an accuracy is: Wilson's interval of a share, and how many images make it narrow enough."""

from __future__ import annotations

from math import ceil, sqrt

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(right: int, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of which n draws gave so many, in [0, 1]. Wilson 1927.

    It is about the choice of images, and says nothing of another training seed.
    """
    middle, reach = (right + Z**2 / 2) / (n + Z**2), half_width(right / n, n)
    return max(middle - reach, 0.0) if right else 0.0, min(middle + reach, 1.0) if right < n else 1.0


def half_width(share: float, n: int) -> float:
    """Return half the width of Wilson's 95 % interval, for a share measured on n images."""
    return Z * sqrt(share * (1 - share) * n + Z**2 / 4) / (n + Z**2)


def images_needed(share: float, width: float) -> int:
    """Return the least number of images for which the interval of a share reaches so far, and no further, each way.

    Args:
        share: in [0, 1]; 0 is the share that needs fewest.
        width: half the width of the interval, above 0.
    """
    # With m = n + Z^2: width^2 m^2 = Z^2 (v (m - Z^2) + Z^2 / 4), v the variance; its larger root.
    v = share * (1 - share)
    b, c = Z**2 * v, Z**4 * (0.25 - v)
    n = ceil((b + sqrt(b * b + 4 * width**2 * c)) / (2 * width**2) - Z**2)
    while half_width(share, n) > width:  # by rounding
        n += 1
    return max(n, 1)
