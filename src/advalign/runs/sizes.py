"""For how many classes and channels the weights in a file are, where nothing but their shapes says it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from advalign import models
from advalign.runs.state_dicts import find_state_dicts, mappings


def count_classes(stored: Any, model: str, channels: int) -> int | None:
    """Return the number of classes with which a network fits the weights in a file.

    Args:
        stored: a state dict, or what has one inside.
        model: the network's spelling.

    Returns:
        None if no number fits, or if the network does not take one.
    """
    two, three = (models.build(model, classes=k, channels=channels).state_dict() for k in (2, 3))
    if all(two[name].shape == value.shape for name, value in three.items()):
        return None
    matrices = [tensor for tensor in _tensors(stored) if tensor.ndim >= 2]
    counts = dict.fromkeys(len(matrix) for matrix in reversed(matrices))  # the head is mostly last
    fits = (k for k in counts if k >= 2 and find_state_dicts(models.build(model, classes=k, channels=channels), stored))
    return next(fits, None)


def likely_classes(stored: Any) -> int:
    """Return the number of classes that the last linear layer in a file is for, which may fit no network; else 10."""
    counts = [len(tensor) for tensor in _tensors(stored) if tensor.ndim == 2 and len(tensor) > 1]
    return counts[-1] if counts else 10


def count_channels(stored: Any) -> int:
    """Return the number of channels that the first convolution in a file takes; 3 if there is none."""
    return next((tensor.shape[1] for tensor in _tensors(stored) if tensor.ndim == 4), 3)


def _tensors(stored: Any) -> list[Tensor]:
    return [tensor for _, tensors in mappings(stored) for tensor in tensors.values()]
