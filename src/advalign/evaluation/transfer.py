"""Transfer attacks: adversarial images made on a surrogate, kept in a file, and shown to other networks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

from advalign.attacks import ATTACKS, Attack
from advalign.attacks.pass_counter import PassCounter
from advalign.data import Images
from advalign.errors import UserError, require
from advalign.evaluation.evaluator import PrecomputedExamples
from advalign.evaluation.options import AttackOptions
from advalign.evaluation.state import StateFile, state_owner
from advalign.evaluation.target import Target
from advalign.models.modes import evaluating
from advalign.registration import source_digests
from advalign.runs.checkpoint import load_state
from advalign.runtime.device import autocast
from advalign.runtime.files import digest, present, read_content, write_atomically
from advalign.runtime.locks import locked
from advalign.runtime.memory import require_memory
from advalign.runtime.progress import counting, say
from advalign.runtime.sealed import Owner, check_sealed, note_unsealed, seal_safetensors
from advalign.runtime.seeds import seeded


def transfer_examples(
    surrogate: Target, attacks: Sequence[Attack], options: AttackOptions, console: Console
) -> dict[str, PrecomputedExamples]:
    """Return the surrogate's adversarial images by the spelling of the attack, made now or read from their files.

    Raises:
        UserError: as `craft_examples`.
    """
    examples = {}
    tasks = {str(attack): f"{attack!s} on {surrogate.label}" for attack in attacks}
    with counting(console, list(tasks.values()), len(surrogate.images)) as advance:
        for attack in attacks:
            spelling = str(attack)
            file = examples_path(surrogate, attack, options)
            if present(state_path(file)):
                say(console, f"resuming an interrupted attack: {state_path(file)}")
            x_adv = craft_examples(
                surrogate.net, surrogate.images, attack, options, file=file,
                advance=lambda done, task=tasks[spelling]: advance(task, done),
            )  # fmt: skip
            examples[spelling] = PrecomputedExamples(x_adv, attack.threat if attack.bounded else None)
    return examples


def craft_examples(
    surrogate: nn.Module,
    images: Images,
    attack: Attack,
    options: AttackOptions,
    *,
    file: Path,
    advance: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """Return adversarial images (N, C, H, W) in [0, 1] of a surrogate, on the CPU; from the file if it exists.

    All images are attacked, also those that the surrogate misclassifies, and to the last step: an attack that stops at
    the surrogate's decision boundary would not carry over to another network. Progress is saved every ten seconds, and
    a second call resumes from there, to the same bits. If another process is making the same examples, it is awaited.

    Args:
        advance: called with the number of images just finished.

    Raises:
        UserError: the attack's examples do not carry over, or the file is damaged.
    """
    attack, lock = transferable(attack), file.with_name(f".{file.name}.lock")
    exists = file.exists()
    if not exists:
        with locked(lock):
            if not (exists := file.exists()):  # another process may have written it while this one waited
                examples = _make(surrogate, images, attack, options, state_path(file), advance)
                write_examples(file, examples)
                state_path(file).unlink(missing_ok=True)
        lock.unlink(missing_ok=True)  # a process that still waits for it then finds the file
    if exists:
        advance(len(images))
    return read_examples(file, tuple(images.shape))


def _make(
    surrogate: nn.Module,
    images: Images,
    attack: Attack,
    options: AttackOptions,
    state: Path,
    advance: Callable[[int], None],
) -> Tensor:
    what, size = f"making adversarial images of {len(images)} images", 8 * images.shape.numel()  # parts, and all
    require_memory(size, torch.device("cpu"), what, "take fewer, with --n")
    made = _read_made(state, images, options) if present(state) else []
    state_file = StateFile(state)
    advance(sum(map(len, made)))
    with evaluating(surrogate):
        network = PassCounter(surrogate)
        batches = torch.arange(len(images), device=images.labels.device).split(options.batch_size)
        for k, rows in list(enumerate(batches))[len(made) :]:
            x, y = images.floats(rows), images.labels[rows]
            with seeded(options.seed, str(attack), k), autocast(x.device, options.precision):
                made.append(attack(network, x, y).float().cpu())
            state_file.save({"made": made})
            advance(len(rows))
    return torch.cat(made).contiguous()


def _read_made(state: Path, images: Images, options: AttackOptions) -> list[Tensor]:
    """Read the batches of examples that are made already.

    Raises:
        UserError: the file is damaged or something else.
    """
    owner = state_owner(state)
    made = load_state(state, ("made",), owner)["made"]
    batches = torch.arange(len(images)).split(options.batch_size)
    shapes = [(len(rows), *images.shape[1:]) for rows in batches]
    fits = isinstance(made, list) and all(isinstance(each, Tensor) and each.is_floating_point() for each in made)
    require(
        fits and [tuple(each.shape) for each in made] == shapes[: len(made)],
        lambda: f"{state} is damaged or of other images: {owner.remedy}",
    )
    return made


def transferable(attack: Attack) -> Attack:
    """Return the attack in the form that continues after an image is misclassified, if it has the choice.

    Raises:
        UserError: its examples would not carry over to another network; the attacks whose examples do are named.
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


def examples_path(surrogate: Target, attack: Attack, options: AttackOptions) -> Path:
    """Return the file of the examples, beside the surrogate's weights and named by all that they depend on."""
    images, path = surrogate.images, surrogate.path
    content = chain(images.content(), [images.labels.cpu().contiguous().numpy().data])
    made_by = (surrogate.model, str(transferable(attack)), str(attack.threat), sorted(asdict(options).items()))
    made_by = (*made_by, surrogate.part, sorted(source_digests([attack]).items()))
    name = f"{path.stem}-{attack.name}-{digest(read_content(path), *content, repr(made_by), digits=10)}.safetensors"
    return path.parent / "transfer" / name


def state_path(file: Path) -> Path:
    """Return the file in which unfinished examples are kept."""
    return file.with_name(f".{file.name}.state")


def _owner(file: Path) -> Owner:
    return Owner(file.name, "remove it, and the examples are made again")


def write_examples(file: Path, x_adv: Tensor) -> None:
    """Write adversarial images (N, C, H, W), sealed.

    Raises:
        UserError: the file cannot be written.
    """
    write_atomically(file, seal_safetensors({"x_adv": x_adv.contiguous()}, {}, _owner(file)))


def read_examples(file: Path, shape: tuple[int, ...]) -> Tensor:
    """Read adversarial images of a shape (N, C, H, W).

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    content, owner = read_content(file), _owner(file)
    if not check_sealed(content, file, owner):
        note_unsealed(file)
    try:
        examples = load(content)["x_adv"]
    except (SafetensorError, KeyError):
        raise UserError(f"{file} is damaged: {owner.remedy}") from None
    if examples.shape != shape or not examples.is_floating_point():
        raise UserError(f"{file} holds {examples.dtype} {tuple(examples.shape)}, not images {shape}: {owner.remedy}")
    return examples
