"""What a CUDA graph would forbid, found without a GPU; and a CUDA graph without one: kernels recorded and run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,  # item, float, int, bool: every branch of Python on a tensor
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.repeat_interleave,
}
"""Operators whose result, or its shape, the host has to know: a capture refuses them."""
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}


def refusal(func: Any, args: Any) -> str:
    """Return why a capture would refuse an operator with these arguments; the empty string if it would not."""
    packet = func.overloadpacket
    mask = packet in INDEXED and any(index.dtype in (torch.bool, torch.uint8) for index in tensors_of(args[1]))
    return f"{func}: the host has to know a value" if packet in READS or mask else ""


@final
class OnMeta(TorchDispatchMode):
    """Notes in `refused` what a capture would refuse of a step on the device `meta`: also any tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if why := refusal(func, args):
            self.refused.append(why)
        if not all(tensor.is_meta for tensor in tensors_of((args, kwargs, output))):
            self.refused.append(f"{func}: a tensor on the host")
        return output


@final
class Recording(TorchDispatchMode):
    """Records every kernel inside, with the tensors and the numbers of Python that it was given.

    `replay` runs the kernels again, on the same memory and with new random draws. Whatever the function decides, counts
    or reads in Python stays that of the recording, as with a CUDA graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor | None]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = {_memory(tensor) for tensor in tensors_of((args, kwargs))}
        made = [None if _memory(tensor) in given else tensor for tensor in tensors_of(output)]
        self.kernels.append((func, args, kwargs, made))
        return output

    @torch.no_grad()
    def replay(self) -> None:
        """Run all kernels once more, in order, into the tensors that they made in the recording."""
        for func, args, kwargs, made in self.kernels:
            for recorded, new in zip(made, tensors_of(func(*args, **kwargs)), strict=True):
                if recorded is not None:
                    recorded.copy_(new)


def record(function: Callable[..., Any], inputs: list[Tensor | None], state: list[Tensor]) -> Callable[[], Any]:
    """Return what replays a function on its inputs' present contents.

    A capture runs nothing, and this runs the function once: so the tensors of `state`, which it changes, and torch's
    generator are put back.
    """
    before, generator = [tensor.detach().clone() for tensor in state], torch.get_rng_state()
    with Recording() as recording:
        output = function(*inputs)
    with torch.no_grad():
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
    torch.set_rng_state(generator)

    def replay() -> Any:
        recording.replay()
        return output

    return replay


def tensors_of(nested: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
