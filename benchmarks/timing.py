"""How ways of doing the same are timed: in turn in one process, with what they cost beside their seconds."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from advalign.runtime.cuda_graphs import WARM_UPS

Way = Callable[[], Any]


def in_turn(ways: Mapping[str, Way], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Return each way's seconds of each round, its order reversed from round to round, after one round of warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name in list(ways) if round_ % 2 else reversed(list(ways)):
            took = once(ways[name], device)
            if round_:
                seconds[name].append(took)
    return seconds


def once(way: Way, device: torch.device) -> float:
    """Return the seconds of one call, the device's queue included."""
    _wait(device)
    began = time.perf_counter()
    way()
    _wait(device)
    return time.perf_counter() - began


def row(seconds: Mapping[str, list[float]]) -> dict[str, Any]:
    """Return medians, and how many times faster each of our ways is than each other: median and range of the rounds."""
    ours = [name for name in seconds if name.startswith("ours")]
    ratios = {
        way: {other: rounds_ratio(times, seconds[way]) for other, times in seconds.items() if other not in ours}
        for way in ours
    }

    def of_each(statistic: Callable[[list[float]], Any]) -> dict[str, dict[str, Any]]:
        return {way: {other: statistic(each) for other, each in others.items()} for way, others in ratios.items()}

    return {
        "seconds": {name: round(statistics.median(times), 4) for name, times in seconds.items()},
        "ratio": of_each(lambda each: round(statistics.median(each), 2)),
        "ratio_range": of_each(lambda each: [round(min(each), 2), round(max(each), 2)]),
    }


def rounds_ratio(slow: list[float], fast: list[float]) -> list[float]:
    """Return each round's ratio of two ways' seconds."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def passes(way: Way, forward: Way) -> dict[str, float]:
    """Return the forward and backward work of one call, in FLOPs of `forward`."""
    counts, unit = _counts(way), sum(_counts(forward).values())
    backward = sum(flops for name, flops in counts.items() if "backward" in name)
    return {"forward": round((sum(counts.values()) - backward) / unit, 2), "backward": round(backward / unit, 2)}


def _counts(way: Way) -> dict[str, int]:
    with _Flops() as counter:
        way()
    return counter.counts


class _Flops(TorchDispatchMode):
    """Counts the operations by name; torch's own counter stumbles over gradients of leaves inside a module."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=output)
            self.counts[str(packet)] = self.counts.get(str(packet), 0) + flops
        return output


def peak_flops(device: torch.device) -> float:
    """Return the most floating-point operations a second of a product of matrices or a convolution here."""
    on_gpu = device.type == "cuda"
    size, images, channels, dtype = (8192, 512, 512, torch.bfloat16) if on_gpu else (2048, 32, 128, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    x, w = (torch.randn(images, channels, 16, 16), torch.randn(channels, channels, 3, 3))
    x, w = (tensor.to(device, dtype, memory_format=torch.channels_last) for tensor in (x, w))
    product, convolution = 2 * size**3, 2 * 9 * channels * x.numel()
    return max(
        _fastest(lambda: a @ b, product, device),
        _fastest(lambda: torch.nn.functional.conv2d(x, w, padding=1), convolution, device),
    )


def _fastest(way: Way, flops: int, device: torch.device) -> float:
    way()
    return flops / min(once(way, device) for _ in range(10))


def peak_memory(make: Callable[..., Way], arguments: tuple[Any, ...], device: torch.device) -> int:
    """Return the most MiB that two calls of a way hold, in a process of its own on the CPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        torch.cuda.reset_peak_memory_stats()
        way = make(*arguments)
        for _ in range(WARM_UPS + 2):  # until a recording is replayed
            way()
        return (torch.cuda.max_memory_reserved() - before) >> 20
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_resident, (make, arguments, torch.get_num_threads()))


def _twice(make: Callable[..., Way], arguments: tuple[Any, ...]) -> None:
    way = make(*arguments)
    way()
    way()


def _resident(make: Callable[..., Way], arguments: tuple[Any, ...], threads: int) -> int:
    torch.set_num_threads(threads)
    _twice(make, arguments)
    status = Path("/proc/self/status").read_text()  # getrusage's peak is inherited from the parent
    return int(status.partition("VmHWM:")[2].split()[0]) >> 10


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
