"""What befalls a file: bits, blocks and ends, another thing in its place, and values that nobody would have written."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load, save_file

from advalign.runs.formats import with_checksum
from advalign.runs.run import run_id
from advalign.runtime.sealed import Owner, seal_npy, seal_safetensors, seal_zip

_JUNK: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "x", "\x00", "\ud800", "$\\foo$", "../..",
    "x" * 300, [], {}, [1, 2], ["x"], {"a": {}}, {"": None},
)  # fmt: skip
_TENSORS = (torch.full((2,), float("nan")), torch.zeros(0), torch.ones(3, 3, dtype=torch.int64), torch.tensor(True))


class Damage(NamedTuple):
    """What was done to a file."""

    what: str
    sealed: bool
    """Whether a checksum speaks against it. If not, the content is believed, whatever it leads to, but no traceback."""


def damage(file: Path, others: list[Path], luck: random.Random) -> Damage:
    """Do one thing to a file.

    Args:
        others: files of its kind that belong to something else.
    """
    if luck.random() < 0.5:
        return Damage(luck.choice((_flip, _flip, _flip, _cut))(file, luck), sealed=True)
    ways: list[Callable[[Path, random.Random], str]] = [_empty, _append, _zero, _swap, _replace_by_no_file]
    if file.suffix in (".json", ".jsonl"):
        ways += [_edit, _edit, _double]
    if others:
        ways += [lambda file, luck: _replace(file, luck.choice(others))]
    sealed = luck.random() < 0.6
    if sealed:
        return Damage(luck.choice(ways)(file, luck), sealed=True)
    return Damage(_FORGERIES[file.suffix](file, luck), sealed=False)


def _flip(file: Path, luck: random.Random) -> str:
    content = bytearray(file.read_bytes())
    at, bit = luck.randrange(len(content)), luck.randrange(8)
    content[at] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {at} of {len(content)} of {file.name} flipped"


def _cut(file: Path, luck: random.Random) -> str:
    content = file.read_bytes()
    length = luck.randrange(len(content))
    file.write_bytes(content[:length])
    return f"{file.name} cut to {length} of {len(content)} bytes"


def _empty(file: Path, luck: random.Random) -> str:
    file.write_bytes(b"")
    return f"{file.name} emptied"


def _append(file: Path, luck: random.Random) -> str:
    content = file.read_bytes()
    more = luck.choice((b"\0" * 512, b"x", b"{}\n", b"\xff\xfe", content))
    file.write_bytes(content + more)
    return f"{len(more)} bytes appended to {file.name}: {more[:4]!r}"


def _zero(file: Path, luck: random.Random) -> str:
    """Write zeros over a block, as a disk does that lost it."""
    content = bytearray(file.read_bytes())
    length = min(luck.choice((1, 16, 512, 4096)), len(content))
    at = luck.randrange(len(content) - length + 1)
    content[at : at + length] = bytes(length)
    file.write_bytes(content)
    return f"{length} zeros at byte {at} of {len(content)} of {file.name}"


def _swap(file: Path, luck: random.Random) -> str:
    content = file.read_bytes()
    length = max(1, min(512, len(content) // 4))
    a = luck.randrange(len(content) - 2 * length + 1) if len(content) > 2 * length else 0
    b = luck.randrange(a + length, max(len(content) - length, a + length) + 1)
    swapped = content[:a] + content[b : b + length] + content[a + length : b] + content[a : a + length]
    file.write_bytes(swapped + content[b + length :])
    return f"{length} bytes at {a} and {b} of {len(content)} of {file.name} swapped"


def _replace(file: Path, other: Path) -> str:
    shutil.copyfile(other, file)
    return f"{other.parent.name}/{other.name} in place of {file.name}"


def _replace_by_no_file(file: Path, luck: random.Random) -> str:
    """Put a folder, a link that leads nowhere or in a circle, or a pipe that nobody writes to in a file's place."""
    what = luck.choice(("a folder", "a full folder", "a link to nothing", "a circle of links", "a pipe"))
    file.unlink()
    match what:
        case "a folder":
            file.mkdir()
        case "a full folder":
            (file / "x").mkdir(parents=True)
        case "a link to nothing":
            file.symlink_to("nothing")
        case "a circle of links":
            file.symlink_to(file.name)
        case _:
            os.mkfifo(file)
    return f"{what} in place of {file.name}"


def _edit(file: Path, luck: random.Random) -> str:
    """Change a value of a JSON file, as an editor does, and leave its checksum."""
    return _edit_json(file, luck, lambda content: content)


def _double(file: Path, luck: random.Random) -> str:
    """Give a key a second time, with another value."""
    lines = file.read_text().splitlines()
    number = luck.randrange(len(lines)) if file.suffix == ".jsonl" else 0
    content = json.loads(lines[number]) if file.suffix == ".jsonl" else json.loads("\n".join(lines))
    key = luck.choice(sorted(content.keys()))
    begin = f"{{{json.dumps(key)}: {json.dumps(luck.choice(_JUNK))}, "
    end = f", {json.dumps(key)}: {json.dumps(luck.choice(_JUNK))}}}"
    line = lines[number].strip()
    lines[number] = begin + line[1:] if luck.random() < 0.5 else line
    if lines[number] == line and file.suffix == ".jsonl":
        lines[number] = line[:-1] + end
    elif lines[number] == line:
        lines[-1] = end[1:] if lines[-1] == "}" else lines[-1]
        lines[-1] = f", {lines[-1].lstrip()}"
    file.write_text("\n".join(lines) + "\n")
    return f"{key} of {file.name} is there twice"


def _unsealed(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in ("checksum", "format")}


def _forged_json(file: Path, luck: random.Random) -> str:
    """Change a value, and take the checksum away, as in a file of an earlier version, or compute it anew."""
    seal = luck.choice((lambda content: content, with_checksum))

    def write(content: dict[str, Any]) -> dict[str, Any]:
        content = _unsealed(content)
        if isinstance(content.get("setting"), dict):
            content["id"] = run_id(content["setting"])
        return seal(content)

    return f"{'forged' if seal is with_checksum else 'unsealed'}: " + _edit_json(file, luck, write)


def _edit_json(file: Path, luck: random.Random, finish: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        what = _mutate(content, luck)
        file.write_text(json.dumps(finish(content), indent=2) + "\n")
        return f"{file.name}: {what}"
    lines = file.read_text().splitlines()
    number = luck.randrange(len(lines))
    content = json.loads(lines[number])
    what = _mutate(content, luck)
    lines[number] = json.dumps(finish(content))
    file.write_text("\n".join(lines) + "\n")
    return f"{file.name}, line {number + 1}: {what}"


def _mutate(content: Any, luck: random.Random, junk: tuple[Any, ...] = _JUNK) -> str:
    """Change one thing anywhere in nested mappings and lists; return what."""
    containers = [content]
    for each in containers:  # grows on the way
        inner = each.values() if isinstance(each, dict) else each
        containers += [value for value in inner if isinstance(value, dict | list) and value]
    container = luck.choice([each for each in containers if each])
    keys = [key for key in container if key != "checksum"] if isinstance(container, dict) else range(len(container))
    key = luck.choice(list(keys))
    before = container[key]
    way = luck.choice(("other", "other", "renamed", "removed", "as text", "cut"))
    if way == "renamed" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif way == "removed":
        del container[key]
    elif way == "as text":
        container[key] = str(before)
    elif way == "cut" and isinstance(before, str | list) and before:
        container[key] = before[:-1]
    else:
        way, container[key] = "other", deepcopy(luck.choice(junk))
        return f"{key!r}: {str(before)[:30]!r} became {str(container[key])[:30]!r}"
    return f"{key!r}: {str(before)[:30]!r} {way}"


def _belongs_to(file: Path) -> Owner:
    """Return the owner that a sealed file names."""
    content = file.read_bytes()
    at = content.rfind(b'"belongs_to": "')
    if at >= 0:
        return Owner(content[at + 15 : content.index(b'"', at + 15)].decode(), "")
    at = content.rfind(b'\\"belongs_to\\": \\"')  # in the metadata of safetensors, which are JSON in JSON
    return Owner(content[at + 18 : content.index(b"\\", at + 18)].decode(), "")


def _forged_safetensors(file: Path, luck: random.Random) -> str:
    content, owner = file.read_bytes(), _belongs_to(file)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    tensors = load(content)
    if "card" in metadata and luck.random() < 0.5:
        card = json.loads(metadata["card"])
        what = _mutate(card, luck)
        metadata["card"] = json.dumps(card)
    else:
        what = _mutate(tensors, luck, _TENSORS)
        tensors = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    metadata.pop("seal", None)
    if luck.random() < 0.3:  # as an earlier version wrote it
        save_file(load(content), file, metadata=metadata)
        return f"unsealed: {_flip(file, luck)}"
    file.write_bytes(seal_safetensors({k: v.contiguous() for k, v in tensors.items()}, metadata, owner))
    return f"forged: {file.name}: {what}"


def _forged_state(file: Path, luck: random.Random) -> str:
    content, owner = torch.load(file, weights_only=True), _belongs_to(file)
    if luck.random() < 0.5:  # as an earlier version wrote it
        torch.save(content, file)
        return f"unsealed: {_flip(file, luck)}"
    optimizer = content.pop("optimizer", {})  # without some buffers, torch finds out in the next step
    what = _mutate(content, luck, (*_JUNK, *_TENSORS))
    content |= {"optimizer": optimizer} if optimizer else {}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file.write_bytes(seal_zip(buffer.getvalue(), owner))
    return f"forged: {file.name}: {what}"


def _forged_npz(file: Path, luck: random.Random) -> str:
    owner = _belongs_to(file)
    with np.load(file) as archive:
        arrays = dict(archive)
    junk = (np.zeros(0), np.array("\x01$\\foo$"), np.array(["\ud800"]), np.full(3, np.nan), np.ones((2, 2), np.int64))
    what = _mutate(arrays, luck, junk)
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{key: np.asarray(value) for key, value in arrays.items()})
    file.write_bytes(seal_zip(buffer.getvalue(), owner))
    return f"forged: {file.name}: {what}"


def _forged_npy(file: Path, luck: random.Random) -> str:
    owner, array = _belongs_to(file), np.load(file)
    other = luck.choice((array[:-1], array.astype(float), array.reshape(-1), array[:0]))
    with file.open("w+b") as draft:
        np.save(draft, other)
        seal_npy(draft, owner)
    return f"forged: {file.name} of shape {other.shape} and type {other.dtype}"


_FORGERIES: dict[str, Callable[[Path, random.Random], str]] = {
    ".json": _forged_json,
    ".jsonl": _forged_json,
    ".safetensors": _forged_safetensors,
    ".pt": _forged_state,
    ".state": _forged_state,
    ".npz": _forged_npz,
    ".npy": _forged_npy,
}
