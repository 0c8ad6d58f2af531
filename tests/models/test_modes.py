"""Eval mode for a while leaves everything as it was."""

from __future__ import annotations

import pytest

from advalign.models import build, evaluating
from advalign.models.modes import frozen


def mixed():
    net = build("small-cnn(width=4)", classes=3).train()
    net.get_submodule("layer2").eval()
    net.get_submodule("layer1").requires_grad_(False)
    return net


def state(net):
    return [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]


def test_is_in_eval_mode_and_frozen_inside_only():
    net = mixed()
    before = state(net)
    with evaluating(net):
        assert not any(state(net)[0] + state(net)[1])
    assert state(net) == before


def test_frozen_keeps_the_modes():
    net = mixed()
    modes, flags = state(net)
    with frozen(net):
        assert state(net) == (modes, [False] * len(flags))
    assert state(net) == (modes, flags)


@pytest.mark.parametrize("during", [frozen, evaluating])
def test_restores_after_an_exception(during):
    net = mixed()
    before = state(net)
    with pytest.raises(KeyError), during(net):
        raise KeyError
    assert state(net) == before
