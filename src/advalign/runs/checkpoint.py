"""Weights as safetensors with a JSON card in the header, and the state a run resumes from; both sealed.

No pickle is executed.
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from advalign.errors import UserError, require
from advalign.runs.formats import check_card
from advalign.runtime.files import write_atomically
from advalign.runtime.sealed import Owner, check_sealed, note_unsealed, seal_safetensors, seal_zip

FETCH_AGAIN = "fetch it again, or train it again"


def save_weights(path: Path, net: nn.Module, card: Mapping[str, Any]) -> None:
    """Write a network's state dict, sealed, and a card that says what it is and how it was made.

    The file belongs to the run that the card names.
    """
    tensors = {name: value.detach().cpu().contiguous() for name, value in net.state_dict().items()}
    owner = Owner(card.get("run", ""), FETCH_AGAIN)
    write_atomically(path, seal_safetensors(tensors, {"card": json.dumps(card)}, owner))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict and its card; the card is empty for files from elsewhere (safetensors, or torch.save'd).

    Raises:
        UserError: the file is missing, damaged, of a newer version, or not a state dict, or its card is no JSON object.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    require(path.is_file(), lambda: f"no weights file {str(path)!r}")
    if path.suffix != ".safetensors":
        state = _load_tensors(_content(path), path, "; to keep a network, save `model.state_dict()`")
        state_dicts = [state] if _is_state_dict(state) else []
        if not state_dicts and isinstance(state, dict):
            state_dicts = [state[key] for key in _WRAPPERS if _is_state_dict(state.get(key))]
        require(bool(state_dicts), lambda: f"{path} is not a state dict: save `model.state_dict()`")
        require(
            len(state_dicts) == 1,
            lambda: f"{path} holds {len(state_dicts)} state dicts: save the one that is meant by itself",
        )
        return state_dicts[0], {}
    content = _content(path)
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


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


# Where training scripts put a network's state dict beside an optimizer's, and what torch's wrappers put before names.
_WRAPPERS = ("state_dict", "model", "net")
_PREFIXES = ("module.", "_orig_mod.")


def _is_state_dict(state: Any) -> bool:
    return isinstance(state, dict) and bool(state) and all(isinstance(value, Tensor) for value in state.values())


def load_into(net: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Copy a state dict into a network; the prefix of a DataParallel or compiled network is taken off.

    Raises:
        UserError: names or shapes do not fit; the first that does not is named.
    """
    own = net.state_dict()
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state) and not all(name.startswith(prefix) for name in own):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    for name, value in own.items():
        require(name in state, lambda: f"{source} does not fit the model: it has no {name!r}")
        shape = tuple(state[name].shape)
        require(
            shape == tuple(value.shape),
            lambda: f"{source} does not fit the model: {name!r} is {shape}, not {tuple(value.shape)}",
        )
    extra = sorted(state.keys() - own.keys())
    require(not extra, lambda: f"{source} does not fit the model, which has no {extra[0] if extra else ''!r}")
    net.load_state_dict(state)


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
    content = _content(path)
    if not check_sealed(content, path, owner, remedy="remove it"):
        note_unsealed(path)
    state = _load_tensors(content, path)
    known = isinstance(state, dict) and set(expected) <= state.keys()
    require(known, lambda: f"{path} is damaged or no state to go on from")
    return state


def _load_tensors(content: bytes, path: Path, advice: str = "") -> Any:
    try:
        with warnings.catch_warnings():  # torch's own, which would come before the one line
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:  # torch.load raises a dozen kinds for a damaged or foreign file, and advises to unpickle it
        raise UserError(f"{path} is damaged or holds more than tensors{advice}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
