"""Transfer: adversarial images made on one network, kept in a file, and shown to others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor, nn

from advalign.attacks import ATTACKS, Attack
from advalign.data import Images
from advalign.errors import UserError, require
from advalign.evaluation import accuracy as evaluation
from advalign.models.fold import Folded
from advalign.models.modes import evaluating
from advalign.runs.checkpoint import load_state, save_state
from advalign.runtime.device import autocast
from advalign.runtime.files import digest, write_atomically
from advalign.runtime.seeds import seeded


def craft_examples(
    surrogate: nn.Module,
    images: Images,
    attack: Attack,
    *,
    batch_size: int,
    precision: str,
    seed: int,
    file: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return adversarial images (N, C, H, W) made on a surrogate, from the file if they were made before.

    All images are attacked, also those that the surrogate gets wrong, and to the last step: an attack that stops at the
    surrogate's boundary would not carry over it. On the CPU. What is made is saved every ten seconds, and a second
    call goes on from there, to the same bits. What another process is making is waited for.

    Raises:
        UserError: the attack has no last step to go on to, or the file is damaged.
    """
    from safetensors.torch import save

    attack, lock = transferable(attack), file.with_name(f".{file.name}.lock")
    there = file.exists()
    if not there:
        with FileLock(lock):
            if not (there := file.exists()):  # else another process was at it
                examples = _make(surrogate, images, attack, batch_size, precision, seed, state_path(file), advance)
                write_atomically(file, save({"x_adv": examples}))
                state_path(file).unlink(missing_ok=True)
        lock.unlink(missing_ok=True)  # whoever still waits for it finds the file
    if there:
        advance(len(images))
    return _read(file, len(images))


def _make(
    surrogate: nn.Module, images: Images, attack: Attack, batch_size: int, precision: str, seed: int, state: Path,
    advance: Callable[[int], None],
) -> Tensor:  # fmt: skip
    made: list[Tensor] = load_state(state, ("made",))["made"] if state.exists() else []
    saved = time.monotonic()
    advance(sum(map(len, made)))
    with evaluating(surrogate):
        fast = Folded(surrogate)
        batches = torch.arange(len(images), device=images.labels.device).split(batch_size)
        for k, rows in list(enumerate(batches))[len(made) :]:
            x, y = images.floats(rows), images.labels[rows]
            with seeded(seed, str(attack), k), autocast(x.device, precision):
                made.append(attack(fast, x, y).float().cpu())
            if time.monotonic() - saved > evaluation.SAVE_SECONDS:
                save_state(state, {"made": made})
                saved = time.monotonic()
            advance(len(rows))
    return torch.cat(made).contiguous()


def state_path(file: Path) -> Path:
    """Return where the examples are kept while they are being made."""
    return file.with_name(f".{file.name}.state")


def transferable(attack: Attack) -> Attack:
    """Return the attack that goes on after an image is fooled, where it has the choice.

    Raises:
        UserError: its examples would not carry over to another model; those that do are named.
    """
    names = [name for name, kind in ATTACKS.items() if kind.transfers]
    require(
        attack.transfers,
        lambda: (
            f"{attack} stops once it fools the surrogate, so its examples would not carry over: "
            f"transfer {', '.join(names)}"
        ),
    )
    return attack.to_the_end


def examples_path(weights: Path, model: str, attack: Attack, images: Images, **how: str | int) -> Path:
    """Return the file of the examples, beside the surrogate's weights and named by all that they depend on."""
    pixels = images.pixels.cpu().contiguous().numpy().data
    made_by = repr((model, str(transferable(attack)), str(attack.threat), sorted(how.items())))
    name = f"{weights.stem}-{attack.name}-{digest(weights.read_bytes(), pixels, made_by, digits=10)}.safetensors"
    return weights.parent / "transfer" / name


def _read(file: Path, n: int) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        examples = load_file(file)["x_adv"]
    except (SafetensorError, KeyError, OSError):
        raise UserError(f"{file} is damaged: remove it, and the examples are made again") from None
    if len(examples) != n:
        raise UserError(f"{file} holds {len(examples)} images, not {n}: remove it, and they are made again")
    return examples
