"""The sizes that every built-in network takes, checked in one place."""

from __future__ import annotations

from advalign.errors import require


def check_sizes(classes: int, channels: int, width: int) -> None:
    """Refuse sizes that make no classifier.

    Raises:
        UserError: fewer than 2 classes, or channels or width below 1.
    """
    require(classes >= 2, f"classes={classes} must be at least 2")
    require(channels >= 1, f"channels={channels} must be at least 1")
    require(width >= 1, f"width={width} must be at least 1")
