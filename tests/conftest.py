from __future__ import annotations

import gc
import random
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor

from advalign.runtime.seeds import seed_generators
from tests import shapes
from tests.networks import Target, half_robust
from tests.samples import batch

torch.set_num_threads(1)  # two workers share two cores
torch.manual_seed(0)  # for what is drawn while the tests are collected
# No deadline: the first call imports, on a busy machine for long. The same examples at every run.
settings.register_profile("repeatable", deadline=None, derandomize=True)
settings.load_profile("repeatable")
gc.disable()  # while thousands of tests are collected, which are all kept


def pytest_collection_finish() -> None:
    gc.freeze()  # what lives until the end is not searched again and again
    gc.enable()


@pytest.fixture(autouse=True)
def begin_alike(request: pytest.FixtureRequest) -> None:
    """Every test draws the same numbers at each run, whichever tests ran before it."""
    shapes.begin_test()
    seed = crc32(request.node.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (libraries draw from it)
    seed_generators(seed)


@pytest.fixture
def x_y() -> tuple[Tensor, Tensor]:
    return batch()


@pytest.fixture(scope="session")
def target() -> Target:
    """A small network that is robust about half of the time, for attacks to be compared on."""
    return half_robust()
