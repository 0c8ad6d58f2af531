"""Runs that must be equal to the bit: states, weights and logs."""

from __future__ import annotations

from pathlib import Path

import torch

from advalign.runs import Run
from advalign.runs.checkpoint import load_state, load_weights


def assert_same(a: object, b: object, where: str = "") -> None:
    """Equal to the bit, through nested containers; seconds alone may differ."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys(), where
        for key in a.keys() - {"seconds"}:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert isinstance(b, list | tuple)
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    assert_same(load_state(a / "state.pt"), load_state(b / "state.pt"), "state")
    for checkpoint in ("best", "last"):
        assert_same(
            load_weights(a / f"{checkpoint}.safetensors"), load_weights(b / f"{checkpoint}.safetensors"), checkpoint
        )
    assert_same(Run.read(a).log, Run.read(b).log, "log")
