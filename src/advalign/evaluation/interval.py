"""How sure an accuracy is: Wilson's interval of a share, and how many images make it narrow enough."""

from __future__ import annotations

from math import ceil, sqrt

Z = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(right: int, n: int, z: float = Z) -> tuple[float, float]:
    """Return the interval of a share of which n draws gave so many, in [0, 1]; 95 % unless said. Wilson 1927.

    It is about the choice of images, and says nothing of another training seed.

    Args:
        z: the quantile of the normal distribution that leaves half of what the interval may miss.
    """
    middle, reach = (right + z**2 / 2) / (n + z**2), half_width(right / n, n, z)
    return max(middle - reach, 0.0) if right else 0.0, min(middle + reach, 1.0) if right < n else 1.0


def half_width(share: float, n: int, z: float = Z) -> float:
    """Return half the width of Wilson's interval, for a share measured on n images; 95 % unless said."""
    return z * sqrt(share * (1 - share) * n + z**2 / 4) / (n + z**2)


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
