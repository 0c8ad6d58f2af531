"""The weights in a file that fit a network, found by structure: in any nesting, behind any prefix, under other names.

A state dict fits if it has every tensor of the network in its shape, and no other behind the same prefix. Counters of
batches may be missing, as they do not enter the outputs. Where names differ, weights fit whose modules have the same
tensors in the same order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_BATCHES = "num_batches_tracked"
_STATISTICS = ("mean", "std", "mu", "sigma")
_IDLE = "sub_block1."  # which the TRADES code's wide networks, and many after it, build and never run
_CHANNELS = 8  # values at most of a mean of images


@dataclass(frozen=True, eq=False)
class Candidate:
    """Tensors of a file that may be a network's: those of one mapping behind one prefix."""

    place: tuple[str, ...]
    """The keys that lead to the mapping."""
    prefix: str
    """What its names have before those of the network, with a dot at its end."""
    inside: str
    """What the network's names have before those of the file: it is wrapped in a module that the file lacks."""
    tensors: Mapping[str, Tensor]
    """The whole mapping."""
    renamed: Mapping[str, str]
    """Of names without prefix that are other in the file: the file's by the network's."""
    left_out: tuple[str, ...]
    """The names in the mapping that are not taken."""

    @property
    def name(self) -> str:
        """What stands for it behind `#`: keys and prefix; a dot for a whole file."""
        return "/".join((*self.place, *filter(None, (self.prefix.removesuffix("."),)))) or "."

    @property
    def normalisation(self) -> list[str]:
        """The names of tensors left out that look like mean and deviation of images."""
        leaves = ((name, name.rpartition(".")[2].strip("_")) for name in self.left_out)
        return [name for name, leaf in leaves if leaf in _STATISTICS and self.tensors[name].numel() <= _CHANNELS]

    @property
    def _alike(self) -> bool:
        """Whether two of the layers that are matched by their order have the same tensors in the same shapes."""
        layers: dict[str, list[tuple[str, torch.Size]]] = {}
        for name in self.renamed.values():
            module, _, leaf = name.rpartition(".")
            layers.setdefault(module, []).append((leaf, self.tensors[self.prefix + name].shape))
        shapes = [tuple(layer) for layer in layers.values()]
        return len(set(shapes)) < len(shapes)

    def of(self, name: str) -> Tensor | None:
        """Return the tensor for one of the network's names; None if there is none."""
        if not name.startswith(self.inside):
            return None
        inner = name.removeprefix(self.inside)
        return self.tensors.get(self.prefix + self.renamed.get(inner, inner))

    def state(self, net: nn.Module) -> dict[str, Tensor]:
        """Return the network's state dict with the tensors of the file, where it has them in their shape.

        A tensor that the network has under two names is that of the file under both.
        """
        state: dict[str, Tensor] = net.state_dict(keep_vars=True)
        named = {name: self.of(name) for name in state}
        found = {name: each for name, each in named.items() if each is not None and each.shape == state[name].shape}
        shared = {id(state[name]): each for name, each in found.items()}
        return {name: found.get(name, shared.get(id(value), value)) for name, value in state.items()}

    def note(self) -> str:
        """Say what was taken and what was left out, in a line; empty for a file that is the state dict."""
        parts = [f"taken from {'/'.join(self.place)!r}"] if self.place else []
        parts += [f"prefix {self.prefix!r} taken off"] if self.prefix else []
        parts += [f"prefix {self.inside!r} put before"] if self.inside else []
        if changed := {ours: theirs for ours, theirs in self.renamed.items() if ours != theirs}:
            ours, theirs = next(iter(changed.items()))
            doubt = ", and layers of equal shape could be exchanged: look at the clean accuracy" if self._alike else ""
            parts.append(f"{len(changed)} tensors have other names there and fit in their order, such as {theirs!r} "
                         f"for {ours!r}{doubt}")  # fmt: skip
        if self.left_out:
            parts.append(f"{len(self.left_out)} other tensors left out, such as {self.left_out[0]!r}")
        return "; ".join(parts)


def find_state_dicts(net: nn.Module, content: Any) -> list[Candidate]:
    """Return the state dicts in a file that fit a network; of several with the same tensors the first."""
    found: list[Candidate] = []
    wanted = _wanted(net)
    every = [(place, tensors) for place, tensors in mappings(content)]
    for find in (_named_alike, _ordered_alike):
        for place, tensors in every:
            for inside, names in wanted.items():
                for candidate in find(place, tensors, inside, names):
                    if not any(_equal(net, candidate, other) for other in found):
                        found.append(candidate)
        if found:
            return found
    return []


def nearest(net: nn.Module, content: Any) -> Candidate | None:
    """Return what comes nearest to fitting: with most of the network's tensors, and most of them in their shape."""
    best, most = None, (0, 0)
    for place, tensors in mappings(content):
        for inside, names in _wanted(net).items():
            for prefix in _prefixes(tensors, names):
                found = [name for name in names if prefix + name in tensors]
                shapes = sum(tensors[prefix + name].shape == names[name].shape for name in found)
                if (shapes, len(found)) > most:
                    most = (shapes, len(found))
                    best = Candidate(place, prefix, inside, tensors, {}, _others(tensors, prefix, names))
    return best


def mappings(content: Any) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the mappings in a file that have tensors by name, outer ones first, with the keys that lead to each."""
    seen: set[int] = set()
    level: list[tuple[tuple[str, ...], Any]] = [((), content)]
    while level:
        inner = []
        for place, each in level:
            if id(each) in seen:  # a pickle may contain itself
                continue
            seen.add(id(each))
            if isinstance(each, Mapping):
                tensors = {key: value for key, value in each.items() if isinstance(key, str) and _is_tensor(value)}
                if tensors:
                    yield place, tensors
                items = list(each.items())
            else:
                items = list(enumerate(each))
            inner += [((*place, str(key)), value) for key, value in items if isinstance(value, Mapping | list | tuple)]
        level = inner


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _wanted(net: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Return the network's tensors by name; also without the prefix that all its parameters share, as in a wrapper."""
    state = net.state_dict()
    wanted, inside = {"": dict(state)}, ""
    names = [name for name, _ in net.named_parameters()]
    while True:
        heads = {name.removeprefix(inside).partition(".")[0] for name in names}
        if len(heads) != 1 or any("." not in name.removeprefix(inside) for name in names):
            return wanted
        inside += f"{heads.pop()}."
        wanted[inside] = {name.removeprefix(inside): value for name, value in state.items() if name.startswith(inside)}


def _named_alike(
    place: tuple[str, ...], tensors: dict[str, Tensor], inside: str, names: Mapping[str, Tensor]
) -> Iterator[Candidate]:
    """Yield what fits by name, behind any prefix."""
    needed = [name for name in names if not name.endswith(_BATCHES)]
    for prefix in _prefixes(tensors, names):
        if all(prefix + name in tensors and tensors[prefix + name].shape == names[name].shape for name in needed):
            candidate = Candidate(place, prefix, inside, tensors, {}, _others(tensors, prefix, names))
            unknown = [name for name in candidate.left_out if name.startswith(prefix)]
            if set(unknown) <= set(candidate.normalisation):
                yield candidate


def _ordered_alike(
    place: tuple[str, ...], tensors: dict[str, Tensor], inside: str, names: Mapping[str, Tensor]
) -> Iterator[Candidate]:
    """Yield what fits in order, behind any prefix."""
    for prefix in dict.fromkeys([*_prefixes(tensors, names), *_shared_prefixes(tensors)]):
        behind = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        renamed = _in_order(names, {name: value for name, value in behind.items() if not name.startswith(_IDLE)})
        if renamed:
            taken = {prefix + name for name in renamed.values()}
            left_out = tuple(name for name in tensors if name not in taken and not name.endswith(_BATCHES))
            yield Candidate(place, prefix, inside, tensors, renamed, left_out)


def _in_order(names: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the given name for each of ours; none where modules differ in tensors or order, or names contradict."""
    ours, theirs = ([name for name in each if not name.endswith(_BATCHES)] for each in (names, given))
    pairs = list(zip(ours, theirs, strict=False))
    alike = len(ours) == len(theirs) and all(
        _leaf(a) == _leaf(b) and names[a].shape == given[b].shape and (a == b or b not in names) for a, b in pairs
    )
    modules = {(a.rpartition(".")[0], b.rpartition(".")[0]) for a, b in pairs}
    one_to_one = len(modules) == len({a for a, _ in modules}) == len({b for _, b in modules})
    return dict(pairs) if alike and one_to_one else {}


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _prefixes(tensors: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> list[str]:
    """Return what stands before the network's names in those of a file; what stands before most of them first."""
    counts: Counter[str] = Counter()
    for name in tensors:
        parts = name.split(".")
        for start in range(len(parts)):
            if ".".join(parts[start:]) in names:
                counts["".join(f"{part}." for part in parts[:start])] += 1
    return [prefix for prefix, _ in counts.most_common()]


def _shared_prefixes(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the empty prefix, and those that all names of a file share."""
    heads = {name.partition(".")[0] for name in tensors}
    if len(heads) != 1 or any("." not in name for name in tensors):
        return [""]
    head = f"{heads.pop()}."
    return ["", *(head + each for each in _shared_prefixes({n.removeprefix(head): t for n, t in tensors.items()}))]


def _others(tensors: Mapping[str, Tensor], prefix: str, names: Mapping[str, Tensor]) -> tuple[str, ...]:
    taken = {prefix + name for name in names}
    return tuple(name for name in tensors if name not in taken)


def _equal(net: nn.Module, a: Candidate, b: Candidate) -> bool:
    return all(torch.equal(one, two) for one, two in zip(a.state(net).values(), b.state(net).values(), strict=True))
