"""The ranks of a run: processes, each on a device of its own, that train one student on shares of each batch.

Everything that ranks do together is here: they add tensors, draw for the whole batch, agree, and write once. Outside of
`joined`, and in a process that trains alone, each function is the identity, or does its work at once.

The loss of a batch is the sum over ranks of each one's loss times its share of the images (`own_part`), and sums over
ranks are differentiable (`all_sum`). So gradients that every rank takes of its own part, added up (`add_up`), are those
of the whole batch, for terms that are means over images and for those that look across the batch alike.
"""

from __future__ import annotations

import atexit
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only

from advalign.errors import RankLost, TrainingError, UserError, require, shorten
from advalign.runtime.seeds import derive_seed, seed_generators

T = TypeVar("T")
R = TypeVar("R")

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells the processes that it starts."""
PATIENCE = timedelta(days=1)
"""How long ranks wait for one that prepares data, or for a guest; one that has died is noticed at once."""
BUCKET = 1 << 24
"""Numbers that are added up at once."""


class Share(NamedTuple):
    """What a rank has of each batch."""

    places: Tensor
    """(n,) where its images stand in the whole batch, in ascending order."""
    size: int
    """Images in the whole batch."""


class _State:
    """What this process knows of the others."""

    joined = False
    alone = 0  # contexts in which this rank works by itself
    share: Share | None = None
    common: Sequence[Tensor] = ()  # states of the generators that all ranks draw from alike


_state = _State()


def launched() -> int:
    """Return how many processes torchrun has started with this one, or 1.

    Raises:
        UserError: the environment names several and does not say how they meet.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in TORCHRUN if name not in os.environ]
    require(world.isdecimal() and int(world) > 0, lambda: f"WORLD_SIZE={world!r} must be a number of processes")
    require(
        world == "1" or not missing,
        lambda: (
            f"WORLD_SIZE={world} announces {world} processes, and {', '.join(missing)} is not set: start them by "
            "torchrun --nproc-per-node, or by --devices, or unset WORLD_SIZE"
        ),
    )
    return int(world)


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Inside, the processes that torchrun has started are the ranks of one run; one alone stays as it is.

    Args:
        device: `auto`, `cpu` or `cuda`, the kind of device that each rank takes one of.

    Yields:
        The device of this rank.

    Raises:
        UserError: the environment or the device does not allow it.
        RankLost: another rank has died; TrainingError where it has said why.
    """
    if launched() == 1 or _state.joined:
        yield device
        return
    local, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    kind = device_for_each(device, local_world)
    own = f"cuda:{local}" if kind == "cuda" else kind
    require(dist.is_available(), "this torch is built without torch.distributed, by which processes meet")
    if dist.is_initialized():
        require(
            "cpu:gloo" in str(dist.get_backend_config()),
            lambda: (
                f"the process group that your script has made is {dist.get_backend_config()}, and ranks also meet on "
                'the CPU: make it with init_process_group("cpu:gloo,cuda:nccl"), or let training make it'
            ),
        )
    else:
        if kind == "cuda":
            torch.cuda.set_device(local)
        # Tensors meet where they lie; what is agreed meets on the CPU, and no GPU is waited for.
        dist.init_process_group("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    _state.joined = True
    try:
        yield own
    except RankLost as error:
        if told := "; ".join(_told()):
            raise TrainingError(told) from error
        raise
    except (UserError, TrainingError) as error:
        with suppress(RuntimeError):  # whoever keeps the store may be lost
            _store().set(_told_by(dist.get_rank()), str(error))
        raise
    finally:
        _state.joined, _state.share, _state.alone = False, None, 0


def _told() -> list[str]:
    """Return what ranks have said before they ended, by which the others lost them."""
    with suppress(RuntimeError):  # whoever keeps the store may be lost
        others = [each for each in range(dist.get_world_size()) if _store().check([_told_by(each)])]
        return [f"rank {each}: {_store().get(_told_by(each)).decode()}" for each in others]
    return []


def _told_by(rank: int) -> str:
    return f"advalign/ended/{rank}"


def _store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def device_for_each(device: str, count: int) -> str:
    """Return the kind of device, `cpu` or `cuda`, of which `count` processes on this machine take one each.

    Raises:
        UserError: one GPU is named, there are fewer, or there is only one of the kind.
    """
    kind, _, index = device.partition(":")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    require(
        not index and kind in ("cpu", "cuda"),
        lambda: f"--device {device} is one device, and {count} processes take one each: choose auto, cpu or cuda",
    )
    require(
        kind != "cuda" or count <= torch.cuda.device_count(),
        lambda: f"{count} processes take a GPU each, and this machine has {torch.cuda.device_count()}",
    )
    return kind


def _leave() -> None:
    """Leave the group at the end of the process, or torch warns."""
    if dist.is_initialized():
        dist.destroy_process_group()


def are_joined() -> bool:
    """Tell whether this process is a rank of a run, be it alone for a while."""
    return _state.joined


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if _state.joined and not _state.alone else 1


def rank() -> int:
    """Return the number of this rank, from 0."""
    return dist.get_rank() if world() > 1 else 0


def on_this_machine() -> int:
    """Return the number of ranks that share this machine's memory."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if are_joined() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this rank works by itself."""
    _state.alone += 1
    try:
        yield
    finally:
        _state.alone -= 1


def take_share(share: Share) -> None:
    """Take the images of each batch from now on for this share of it, as long as this process is joined."""
    _state.share = share


def _share() -> Share | None:
    return _state.share if world() > 1 else None


def places(count: int, device: torch.device) -> Tensor:
    """Return where this rank's rows stand in the whole batch, (count,).

    Args:
        count: of its rows; a multiple of its images where the batch holds several augmentations, one after the other.
    """
    share = _share()
    if share is None:
        return torch.arange(count, device=device)
    own = share.places.to(device)
    return torch.cat([own + k * share.size for k in range(count // len(own))])


def whole(count: int) -> int:
    """Return how many rows all ranks together have, where this one has `count`."""
    share = _share()
    return count if share is None else count // len(share.places) * share.size


def own_part(value: Tensor) -> Tensor:
    """Return a mean over this rank's images times their share: the sum over ranks is the mean over the batch."""
    share = _share()
    return value if share is None else value * (len(share.places) / share.size)


def batch_mean(value: Tensor) -> Tensor:
    """Return the mean over the whole batch of what is a mean over this rank's images; differentiable."""
    return all_sum(own_part(value))


def batch_means(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `batch_mean` of several scalars at once, without gradient."""
    if world() == 1:
        return {name: value.detach() for name, value in values.items()}
    means = batch_mean(torch.stack([value.detach().double() for value in values.values()]))
    return dict(zip(values, means.unbind(), strict=True))


def gather(rows: Tensor) -> Tensor:
    """Return the rows (n, ...) of all ranks (N, ...), in the order in which one process has them; differentiable."""
    if world() == 1:
        return rows
    nothing = rows.new_zeros(whole(len(rows)), *rows.shape[1:])
    return all_sum(nothing.index_copy(0, places(len(rows), rows.device), rows))


def own_rows(rows: Tensor) -> Tensor:
    """Return this rank's rows (n, ...) of those of all ranks (N, ...)."""
    share = _share()
    return rows if share is None else rows[places(len(rows) // share.size * len(share.places), rows.device)]


def all_sum(value: Tensor) -> Tensor:
    """Return the sum over ranks, the same on each; the gradient is the sum of theirs."""
    return value if world() == 1 else _Sum.apply(value)  # pyright: ignore[reportReturnType]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _reduced(value.detach().clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _reduced(grads[0].clone(memory_format=torch.contiguous_format))


@torch.no_grad()
def add_up(tensors: Iterable[Tensor]) -> None:
    """Put the sum over ranks into each tensor, in place."""
    if world() == 1:
        return
    kinds: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor)
    for same in kinds.values():
        for bucket in _buckets(same):
            flat = _reduced(torch.cat([tensor.flatten() for tensor in bucket]))
            for tensor, total in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                tensor.copy_(total.view(tensor.shape))


def add_up_gradients(parameters: Iterable[Tensor]) -> None:
    """Put the sum over ranks into the gradients; a parameter that no rank's loss depends on keeps none."""
    if world() == 1:
        return
    parameters = list(parameters)
    grads = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
    add_up(grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        if parameter.grad is None and bool(grad.any()):
            parameter.grad = grad


@torch.no_grad()
def copy_first(tensors: Iterable[Tensor]) -> None:
    """Put what the first rank has into each tensor, in place; all have as many, of the same shapes."""
    if world() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for same in kinds.values():
        for bucket in _buckets(same):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            with _noticing():
                dist.broadcast(flat.view(torch.uint8), 0)  # as bytes: gloo does not send every type
            for tensor, copy in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                tensor.copy_(copy.view(tensor.shape))


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def seed_step(seed: int) -> None:
    """Seed the generators for a step: `draw` draws alike on all ranks, and what a network draws is each one's own."""
    seed_generators(seed)
    if _share() is not None:
        _state.common = [generator.get_state() for generator in _generators()]
        seed_generators(derive_seed(seed, "rank", rank()))


def draw(make: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Return this rank's rows (n, ...) of what is drawn at random for the whole batch, as one process would draw it.

    Args:
        make: draws a tensor for something of the shape of a batch, such as `torch.randn_like`: a row for each of its
            rows, whatever their values.
        like: (n, ...), this rank's images.
    """
    if _share() is None:
        return make(like)
    batch = like.new_empty(whole(len(like)), *like.shape[1:])
    if like.ndim == 4 and like.is_contiguous(memory_format=torch.channels_last):  # a draw follows the order in memory
        batch = batch.contiguous(memory_format=torch.channels_last)
    with _common_generators():
        return own_rows(make(batch))


@contextmanager
def _common_generators() -> Iterator[None]:
    """Draw inside from what is the same on all ranks."""
    generators = _generators()
    own = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, _state.common, strict=False):
        generator.set_state(state)
    yield
    _state.common = [generator.get_state() for generator in generators]
    for generator, state in zip(generators, own, strict=True):
        generator.set_state(state)


def _generators() -> list[torch.Generator]:
    gpu = [torch.cuda.default_generators[torch.cuda.current_device()]] if torch.cuda.is_initialized() else []
    return [torch.default_generator, *gpu]


def agree(*flags: bool) -> tuple[bool, ...]:
    """Return for each flag whether it is raised on any rank."""
    if world() == 1:
        return flags
    return tuple(_reduced(torch.tensor(flags, dtype=torch.uint8, device="cpu"), dist.ReduceOp.MAX).bool().tolist())


def require_alike(**values: object) -> None:
    """Refuse ranks that were started with something different; called by all of them.

    Raises:
        UserError: a value is not that of the first rank.
    """
    if world() == 1:
        return
    first, *others = _exchanged(values)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            require(
                other[name] == value,
                lambda: (
                    f"rank {number} has {name.replace('_', ' ')} {shorten(str(other[name]))}, and rank 0 has "
                    f"{shorten(str(value))}: all ranks take the same arguments, data and code"
                ),
            )


def lead(work: Callable[[], T]) -> T:
    """Let the first rank work, alone, while the others wait; return on all what it returns, or raise what it raises."""
    if world() == 1:
        return work()
    outcome = [_outcome(work) if rank() == 0 else None]
    with _noticing():
        dist.broadcast_object_list(outcome, 0)
    assert outcome[0] is not None
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Return what work, done alone, returns, with its tensors on the CPU, or the error that it raises."""
    with alone():
        try:
            return tree_map_only(Tensor, Tensor.cpu, work()), None
        except (UserError, TrainingError, OSError) as error:
            return None, error


def spread(items: Sequence[T], work: Callable[[T], R]) -> Iterator[R]:
    """Yield what each item becomes, in order, on all ranks; they take turns with the items, each working alone.

    An error of one rank is raised on all. Tensors come on the CPU, unless one process works alone.
    """
    if world() == 1:
        yield from map(work, items)
        return
    for first in range(0, len(items), world()):
        mine = first + rank()
        outcome = _outcome(lambda: work(items[mine])) if mine < len(items) else (None, None)
        outcomes = _exchanged(outcome)[: len(items) - first]
        for _, error in outcomes:
            if error is not None:
                raise error
        for result, _ in outcomes:
            yield result


@contextmanager
def together() -> Iterator[None]:
    """What one rank raises inside, all raise; for work that all do, without meeting on the way."""
    error: Exception | None = None
    with alone():
        try:
            yield
        except (UserError, TrainingError, OSError) as raised:
            error = raised
    if world() == 1:
        if error is not None:
            raise error
        return
    for number, each in enumerate(_exchanged(error)):
        if each is not None:
            raise each if number == 0 else type(each)(f"{each} (rank {number})")


def first_ahead(work: Callable[[], T]) -> T:
    """Do work on every rank, each alone, and on the first one before the others, who find the files that it leaves."""
    done: list[T] = []
    first = rank() == 0
    for turn in (True, False):
        with together():
            if first is turn:
                done.append(work())
    return done[0]


def _exchanged(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    with _noticing():
        dist.all_gather_object(values, value)
    return values


def _reduced(tensor: Tensor, how: Any = None) -> Tensor:
    with _noticing():
        dist.all_reduce(tensor, dist.ReduceOp.SUM if how is None else how)
    return tensor


@contextmanager
def _noticing() -> Iterator[None]:
    """Tell a rank that has died from errors of one's own."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_a_connection(error):
            raise
        line = str(error).strip().partition("\n")[0]
        raise RankLost(
            f"rank {dist.get_rank()} has lost another rank; what was saved last is kept, and the same command goes on, "
            f"with any number of ranks ({line[:100]})"
        ) from error


def _is_of_a_connection(error: RuntimeError) -> bool:
    """Tell whether an exchange failed for want of the other side; gloo and NCCL say so in words alone."""
    words = str(error)
    return not isinstance(error, torch.OutOfMemoryError) and re.search(_CONNECTION, words, re.IGNORECASE) is not None


_CONNECTION = r"connection|gloo|socket|broken pipe|network|nccl.*(remote|abort|system)|timed? ?out"
