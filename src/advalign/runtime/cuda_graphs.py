"""CUDA graphs: the kernels of a step recorded once and replayed, since at small batches launching them takes longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

WARM_UPS = 3


@final
class CudaGraphed:
    """A function of tensors that is recorded as a CUDA graph and replayed with new contents of its arguments.

    The first calls run as they are, on a stream of their own, so that lazy state (momentum, folded twins, cuDNN's
    choice of kernels) is there before the recording. The function may read and write tensors that stay where they are,
    such as weights, and draw from torch's generator; it must not wait for the device, and Python values that it reads
    are those of the recording until `forget` is called. What it returns is overwritten by the next call.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.warm_ups = function, WARM_UPS
        self.forget()

    def forget(self) -> None:
        """Record anew at the next call."""
        self.shapes: list[Any] = []
        self.inputs: list[Tensor | None] = []
        self.replay: Callable[[], Any] | None = None

    def __call__(self, *tensors: Tensor | None) -> Any:
        """Return what the function gives for these tensors."""
        if self.warm_ups:
            self.warm_ups -= 1
            return _aside(self.function, tensors)
        shapes = [None if tensor is None else (tensor.shape, tensor.dtype) for tensor in tensors]
        if self.replay is None or shapes != self.shapes:
            self.shapes, self.inputs = shapes, [None if tensor is None else tensor.clone() for tensor in tensors]
            self.replay = _record(self.function, self.inputs)
        for recorded, new in zip(self.inputs, tensors, strict=True):
            if recorded is not None and new is not None:
                recorded.copy_(new)
        return self.replay()


def _aside(function: Callable[..., Any], tensors: tuple[Tensor | None, ...]) -> Any:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output = function(*tensors)
    torch.cuda.current_stream().wait_stream(stream)
    return output


def _record(function: Callable[..., Any], inputs: list[Tensor | None]) -> Callable[[], Any]:
    """Return what replays the function on its inputs' present contents; recording runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function(*inputs)

    def replay() -> Any:
        graph.replay()
        return output

    return replay
