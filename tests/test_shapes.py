"""The shapes that signatures state are checked in every package that states them, and only under test."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from jaxtyping import TypeCheckError

from advalign import Linf
from advalign.attacks.classification import classified
from advalign.data.images import to_unit
from advalign.models import build
from advalign.objectives.distances import pairwise_gap

WRONG = {
    "threats": lambda: Linf(0.1).distance(torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 5)),
    "attacks": lambda: classified(torch.rand(3, 10), torch.zeros(4, dtype=torch.long)),
    "objectives": lambda: pairwise_gap(torch.rand(3, 10), torch.rand(3, 9), torch.rand(3, 10)),
    "models": lambda: build("small-cnn(width=2)", classes=10)(torch.rand(3, 8, 8)),
    "data": lambda: to_unit(torch.rand(3, 8, 8)),
}


@pytest.mark.parametrize("room", WRONG)
def test_a_wrong_shape_is_noticed(room: str):
    with pytest.raises(TypeCheckError):
        WRONG[room]()


@pytest.mark.slow
def test_users_do_not_pay_for_it():
    code = "import sys; import advalign as aa; aa.compose, aa.attacks.PGD, aa.models.build, aa.data.load; "
    code += "print('beartype' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
