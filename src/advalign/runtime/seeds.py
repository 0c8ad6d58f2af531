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


def seed_generators(seed: int) -> None:
    """Seed the CPU's generator and every accelerator's, as `torch.manual_seed` does.

    Where there is no accelerator, that one formats a traceback for each kind: a hundred times as long.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Draw from a generator seeded with the parts inside, and leave the global generators as they were.

    Other threads that need the global generators wait.
    """
    with TURN, torch.random.fork_rng(range(torch.cuda.device_count())):  # every GPU is seeded
        seed_generators(derive_seed(*parts))
        yield
