"""How much memory is free: on a device, or in this machine within the limits that the process has."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path, PurePosixPath

import torch

from advalign.errors import require

_CGROUPS = {
    "memory": ("memory/{}/memory.limit_in_bytes", "memory/{}/memory.usage_in_bytes", "total_inactive_file"),
    "": ("{}/memory.max", "{}/memory.current", "inactive_file"),
}
"""Of each version of cgroups, by its controller in /proc/self/cgroup: limit, use, and what of the use is cache."""
_OWN_GROUPS, _LIMITS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Return the bytes that can still be taken on a device, at least 0; of the CPU, within the process's limits."""
    match device.type:
        case "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        case "mps":
            return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
        case "cpu":
            return max(0, min(_available(), _left_of_address_space(), _left_of_cgroup()))
    return sys.maxsize  # such as meta, which holds no values


def readable_size(size: int) -> str:
    """Write bytes for readers: 640 MiB, 28.7 GiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def require_memory(size: int, device: torch.device, what: str, remedy: str) -> None:
    """Refuse to hold what does not fit, before hours are spent on the first part of it.

    Raises:
        UserError: more is needed than is free on the device: what takes it, both sizes, and what to do.
    """
    free = free_memory(device)
    require(
        size <= free,
        lambda: (
            f"{what} takes {readable_size(size)} of memory, and {readable_size(free)} are free on {device}: {remedy}"
        ),
    )


def _available() -> int:
    """Return what the system would give without swapping; half of all memory where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _left_of_address_space() -> int:
    """Return what `ulimit -v` leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit == resource.RLIM_INFINITY:
        return sys.maxsize
    try:
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        taken = 0
    return limit - taken


def _left_of_cgroup() -> int:
    """Return what the limits of the process's control group and of all around it leave; cached files give way."""
    left = sys.maxsize
    try:
        groups = [line.split(":", 2)[1:] for line in _OWN_GROUPS.read_text().splitlines()]
    except OSError:
        return left
    for controller, group in groups:
        if controller in _CGROUPS:
            own = PurePosixPath(group.strip("/"))
            for place in {own, *own.parents, PurePosixPath()}:  # a container may see its own group as the root
                left = min(left, _left_of(str(place), *_CGROUPS[controller]))
    return left


def _left_of(group: str, limit: str, usage: str, cached: str) -> int:
    try:
        most = (_LIMITS / limit.format(group)).read_text().strip()
        if most == "max":
            return sys.maxsize
        lines = (_LIMITS / usage.format(group)).with_name("memory.stat").read_text().splitlines()
        cache = next((int(line.split()[1]) for line in lines if line.split()[0] == cached), 0)
        return int(most) - int((_LIMITS / usage.format(group)).read_text()) + cache
    except (OSError, ValueError):  # this version is not there, or the group is seen under another name
        return sys.maxsize
