"""Which BatchNorms of a network can be folded into the convolutions before them, and why none is."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from typing import Any

from torch import fx, nn

from advalign.errors import shorten
from advalign.models.synced_norm import SyncedNorm2d

_log = logging.getLogger("advalign")
_noted: set[str] = set()  # what was said of networks that are not folded


def foldable_pairs(net: nn.Module) -> list[tuple[str, str]]:
    """Return the names of each convolution and the BatchNorm that alone reads it, where no hook looks in between."""
    try:
        graph = trace(net)
    except Exception as error:  # a user's forward, run on symbols, may raise anything; the unfolded twin is right
        if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
            note_unfolded(net, f"torch.fx cannot trace it: {type(error).__name__}: {error}")
        return []
    named = {node: _module_named(node) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    uses = Counter(named.values())
    calls = [(node, name) for node, name in named.items() if node.op == "call_module" and uses[name] == 1]
    once = {node: net.get_submodule(name) for node, name in calls}
    hooked = [name for name, module in net.named_modules() if has_hooks(module)]
    pairs = []
    for source, conv in once.items():
        reader = next(iter(source.users), None)
        norm = once.get(reader) if reader is not None and len(source.users) == 1 else None
        if reader is None or type(conv) is not nn.Conv2d or not isinstance(norm, nn.BatchNorm2d):
            continue
        if type(norm) not in (nn.BatchNorm2d, SyncedNorm2d):  # a user's own may compute something else
            continue
        watched = any(_within(named[source], name) != _within(named[reader], name) for name in hooked)
        if norm.track_running_stats and not watched:
            pairs.append((named[source], named[reader]))
    return pairs


def trace(net: nn.Module) -> fx.Graph:
    """Return what a network does, as a graph of its modules without children and of functions.

    Raises:
        Exception: whatever a forward raises that is run on symbols.
    """
    parameters = inspect.signature(net.forward).parameters.values()
    options = {p.name: p.default for p in parameters if p.default is not p.empty}
    return _Tracer().trace(net, concrete_args=options)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether something looks at what a module reads or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def note_unfolded(net: nn.Module, reason: str) -> None:
    """Say once why a network runs without its BatchNorms folded."""
    line = f"note: {type(net).__name__} runs as it is, without BatchNorm folded into its convolutions, and slower: "
    line += shorten(" ".join(reason.split()))
    if line not in _noted:
        _noted.add(line)
        _log.warning(line)


class _Tracer(fx.Tracer):
    """Leaves hooks out: a tap wants tensors, not the tracer's symbols."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Look into no module without children: nothing in it can be folded, and its code may not suit symbols."""
        return not any(m.children()) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_module(m, m.forward, args, kwargs)


def _module_named(node: fx.Node) -> str:
    """Return the module that a node calls, or whose tensor it reads."""
    target = str(node.target)
    return target if node.op == "call_module" else target.rpartition(".")[0]


def _within(name: str, module: str) -> bool:
    return f"{name}.".startswith(f"{module}." if module else "")
