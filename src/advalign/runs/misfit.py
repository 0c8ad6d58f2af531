"""Why the weights in a file do not fit a network: the first tensor that does not, and the likely cause."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from advalign.errors import quoted
from advalign.runs.state_dicts import Candidate, mappings, nearest


def misfit(net: nn.Module, content: Any) -> str:
    """Return what does not fit, as the end of a sentence that begins with the file and `does not fit the model`.

    Args:
        content: what the file holds, in which no state dict fits.
    """
    near = nearest(net, content)
    if near is None:
        ours = next(iter(net.state_dict()), "")
        theirs = next((name for _, tensors in mappings(content) for name in tensors), "")
        return f": it has no {quoted(ours)}, but {quoted(theirs)}: a network of another architecture"
    state = net.state_dict()
    for name, own in state.items():
        found = near.of(name)
        if found is None:
            return f": it has no {quoted(name)}{_cause_of_missing(near, name)}"
        if found.shape != own.shape:
            return f": {quoted(name)} is {tuple(found.shape)}, not {tuple(own.shape)}{_cause(net, near, name, found)}"
    extra = next((name for name in near.left_out if name.startswith(near.prefix)), near.left_out[0])
    return f", which has no {quoted(extra.removeprefix(near.prefix))}: a deeper network, or another architecture"


def _cause_of_missing(near: Candidate, name: str) -> str:
    if name.rpartition(".")[2] in ("running_mean", "running_var"):
        return ": parameters without the statistics of their BatchNorm, as some averages of weights are"
    module, _, leaf = name.rpartition(".")
    written = (f"{name}_g", f"{name}_orig", *(f"{module}.parametrizations.{leaf}.original{n}" for n in ("", "0")))
    if any(near.of(each) is not None for each in written):
        return (
            ": there it is made of others, as by weight or spectral norm or pruning: name a network that has that too"
        )
    return ""


def _cause(net: nn.Module, near: Candidate, name: str, found: Tensor) -> str:
    """Return the likely cause of the first shape that differs."""
    state = net.state_dict()
    shape, own = tuple(found.shape), tuple(state[name].shape)
    wrong = [each for each in state if (other := near.of(each)) is not None and other.shape != state[each].shape]
    last = list(dict(net.named_parameters()))[-1].rpartition(".")[0]
    if all(each.rpartition(".")[0] == last for each in wrong) and shape[1:] == own[1:]:
        return f": it is a network for {shape[0]} classes, not {own[0]}"
    if len(shape) == len(own) == 4 and shape[2:] != own[2:] and name == next(iter(state)):
        return (
            f": its first layer is {shape[2]}x{shape[3]}, not {own[2]}x{own[3]}, as in networks for larger images; "
            "name such a network as package.module:function"
        )
    if len(shape) == len(own) == 4 and shape[0] == own[0] and name == next(iter(state)):
        return f": it is a network for images of {shape[1]} channels, not {own[1]}"
    if len(shape) == len(own) and len(wrong) > 1:
        return ": a network of another width, or another architecture"
    return ""
