"""Seeds that depend on everything they are mixed from, and random draws that leave no trace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from advalign.runtime.threads import TURN


def derive_seed(*parts: int | str) -> int:
    """Return a seed that depends on every part and its place, so that neighbouring runs and steps are unrelated."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Draw from a generator seeded with the parts inside, and leave the global generators as they were.

    Other threads that need the global generators wait.
    """
    with TURN, torch.random.fork_rng(range(torch.cuda.device_count())):  # manual_seed seeds every GPU
        torch.manual_seed(derive_seed(*parts))
        yield
