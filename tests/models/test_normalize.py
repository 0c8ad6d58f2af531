"""Normalisation as the first layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from advalign.errors import UserError
from advalign.models import Normalized


def test_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel():
    x = torch.rand(2, 3, 4, 4)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    expected = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], 1)
    torch.testing.assert_close(Normalized(nn.Identity(), mean, std)(x), expected)


def test_has_nothing_to_train_and_moves_with_the_network():
    net = Normalized(nn.Identity(), [0.5], [0.25]).double()
    assert not list(net.parameters())
    assert net.mean.dtype == torch.float64
    assert set(net.state_dict()) == {"mean", "std"}


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [([0.5] * 3, [0.2], "mean has 3 channels, std has 1"), ([0.5], [0.0], "std=0.0 must be positive")],
)
def test_refuses_what_is_no_normalisation(mean, std, message):
    with pytest.raises(UserError, match=message):
        Normalized(nn.Identity(), mean, std)
