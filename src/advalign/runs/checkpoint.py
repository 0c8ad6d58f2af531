"""Weights as safetensors with a JSON card in the header, and the state a run resumes from; both sealed.

No pickle is executed.
"""

from __future__ import annotations

import io
import json
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import nn

from advalign.errors import UserError, require, unknown
from advalign.runs.formats import check_card
from advalign.runs.misfit import misfit
from advalign.runs.state_dicts import Candidate, find_state_dicts, mappings
from advalign.runtime.files import read_content, write_atomically
from advalign.runtime.sealed import Owner, check_sealed, note_unsealed, seal_safetensors, seal_zip

Kind = TypeVar("Kind")

_NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS, to be replaced by its file with: git lfs pull",
    b"<": "a web page, as after a download that failed",
}
"""What files are instead, by how they begin."""
FETCH_AGAIN = "fetch it again, or train it again"


def save_weights(path: Path, net: nn.Module, card: Mapping[str, Any]) -> None:
    """Write a network's state dict, sealed, and a card that says what it is and how it was made.

    The file belongs to the run that the card names.
    """
    # Copies, since safetensors refuses tensors that share memory, as those of a module under two names do.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in net.state_dict().items()
    }
    owner = Owner(card.get("run", ""), FETCH_AGAIN)
    write_atomically(path, seal_safetensors(tensors, {"card": json.dumps(card)}, owner))


def load_weights(path: Path) -> tuple[Any, dict[str, Any]]:
    """Read the tensors of a file, and the card of ours; the card is empty for files from elsewhere.

    Those are safetensors, or written by `torch.save`, in zip or in the older format; the state dict may lie anywhere
    inside, and `load_into` finds it.

    Raises:
        UserError: the file is missing, damaged, of a newer version, or without tensors, or its card is no JSON object.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    require(path.is_file(), lambda: f"no weights file {str(path)!r}")
    content = read_content(path)
    if path.suffix != ".safetensors" and content[8:9] != b"{":  # where the header of safetensors begins
        stored = _load_tensors(content, path, "; to keep a network, save `model.state_dict()`")
        has_tensors = any(True for _ in mappings(stored))
        require(has_tensors, lambda: f"{path} is not a state dict: save `model.state_dict()`")
        return stored, {}
    sealed = check_sealed(content, path, None, remedy=FETCH_AGAIN)
    try:
        state, card = load(content), _card(content)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged or not safetensors: {_first_line(error)}") from None
    if card and not sealed:
        note_unsealed(path)
    return state, check_card(card, path)


def _card(content: bytes) -> Any:
    """Return the card in the header of safetensors: 8 bytes of length, then JSON."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header.get("__metadata__", {}).get("card", "{}"))


def load_into(net: nn.Module, stored: Any, source: str, *, part: str = "", normalized: bool = False) -> str:
    """Copy the state dict in a file's content that fits a network into it; return a line on what was taken.

    Args:
        stored: a state dict, or what has one inside; see `advalign.runs.state_dicts`.
        source: the file, for messages.
        part: which of several state dicts, as `FILE#PART` names it.
        normalized: whether the network reads images that are normalised before it.

    Returns:
        Where the state dict was, and how its names differed; empty for a file that is the state dict.

    Raises:
        UserError: names or shapes do not fit, and the first that does not is named, with the likely cause; several
            state dicts fit; or the file has a normalisation of images and the network has not.
    """
    fitting = find_state_dicts(net, stored)
    require(bool(fitting), lambda: f"{source} does not fit the model{misfit(net, stored)}")
    names = [each.name for each in fitting]
    if part and part not in names:
        raise unknown(f"state dict of {source}", part, names)
    require(
        bool(part) or len(fitting) == 1,
        lambda: (
            f"{source} holds {len(names)} state dicts that fit and differ, {', '.join(map(repr, names))}: write the "
            f"one that is meant behind the file, as in '{source}#{names[-1]}'"
        ),
    )
    chosen = fitting[names.index(part)] if part else fitting[0]
    if chosen.normalisation and not (normalized or chosen.inside):
        raise UserError(f"{source} normalises its images, and the model does not: {_normalisation(chosen)}")
    _require_numbers(net, chosen, source)
    net.load_state_dict(chosen.state(net))
    return chosen.note()


def _require_numbers(net: nn.Module, chosen: Candidate, source: str) -> None:
    """Refuse weights that have the right shapes and cannot be a trained network's: whole numbers, or not a number.

    Raises:
        UserError: the first such tensor.
    """
    for name, parameter in net.named_parameters():
        found = chosen.of(name)
        if found is None or not parameter.is_floating_point():
            continue
        kind = found.dtype
        require(
            kind.is_floating_point,
            lambda: f"{source} has {name!r} in {kind}, as quantised networks do: floats are needed",
        )
        require(
            not bool(found.isnan().any()),
            lambda: f"{source} has values in {name!r} that are not a number, as after a training that has diverged",
        )


def _normalisation(chosen: Candidate) -> str:
    """Show the values of a normalisation in a file, and what to do with them."""
    values = {name: " ".join(f"{v:.4g}" for v in chosen.tensors[name].flatten()) for name in chosen.normalisation}
    shown = ", ".join(f"{name!r} is {value}" for name, value in values.items())
    return (
        f"{shown}; give them as --mean and --std to evaluate or diagnose, or name a network of your own with "
        "advalign.models.Normalized"
    )


def save_state(path: Path, state: Mapping[str, Any], owner: Owner) -> None:
    """Write what a run, or an evaluation, resumes from, sealed."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_atomically(path, seal_zip(buffer.getvalue(), owner))


def load_state(
    path: Path, expected: Collection[str] = ("objective", "optimizer"), owner: Owner | None = None
) -> dict[str, Any]:
    """Read what a run, or an evaluation, resumes from.

    Args:
        expected: keys that it must have.
        owner: what it must belong to; None if it may be anybody's.

    Raises:
        UserError: the file is damaged, of a newer version, another owner's, or something else.
    """
    content = read_content(path)
    if not check_sealed(content, path, owner, remedy="remove it"):
        note_unsealed(path)
    state = _load_tensors(content, path)
    known = isinstance(state, dict) and set(expected) <= state.keys()
    require(known, lambda: f"{path} is damaged or no state to go on from")
    return state


def convert_state(content: Mapping[str, Any], kind: type[Kind], path: Path) -> Kind:
    """Return the content of a state file as the dataclass that it was written from.

    Raises:
        UserError: the first field of another type.
    """
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is damaged or no state to go on from: {str(error)[:200]}") from None


def _load_tensors(content: bytes, path: Path, advice: str = "") -> Any:
    try:
        with warnings.catch_warnings():  # torch's own, which would come before the one line
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen kinds for a damaged or foreign file, and advises to unpickle
        if kind := next((kind for start, kind in _NO_WEIGHTS.items() if content.lstrip().startswith(start)), ""):
            raise UserError(f"{path} holds no tensors: it is {kind}") from None
        require(bool(content), lambda: f"{path} is empty")
        program = re.search(r"GLOBAL ([\w.]+)", str(error))
        named = f" ({program[1]})" if program else ""
        raise UserError(f"{path} is damaged or holds more than tensors{named}{advice}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
