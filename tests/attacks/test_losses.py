"""Shapes are types: under test, a wrong batch size is an error where it is made and not a broadcast later."""

from __future__ import annotations

import jaxtyping
import pytest
import torch

from advalign.attacks.losses import cross_entropy, kl_divergence, margin


@pytest.mark.parametrize("loss", [cross_entropy, margin])
def test_a_wrong_number_of_labels_is_caught(loss):
    with pytest.raises(jaxtyping.TypeCheckError):
        loss(torch.randn(4, 3), torch.zeros(1, dtype=torch.long))


def test_a_target_of_another_shape_is_caught():
    with pytest.raises(jaxtyping.TypeCheckError):
        kl_divergence(torch.randn(4, 3), torch.randn(1, 3))
