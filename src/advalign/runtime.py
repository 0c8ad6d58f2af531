"""Where and how tensors are computed: device, precision, seeds, and what to write down about the machine."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from advalign.errors import require, unknown

Net = TypeVar("Net", bound=nn.Module)


def pick_device(name: str = "auto") -> torch.device:
    """Return the device of a name: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        UserError: unknown name, or a device that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, colon, index = name.partition(":")
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if kind not in available or (colon and not index.isdecimal()):
        raise unknown("device", name, ["auto", *available])
    require(available[kind], f"device {name!r} is not available on this machine; use 'auto' or 'cpu'")
    if kind == "cuda" and index:
        count = torch.cuda.device_count()
        require(int(index) < count, f"device {name!r} does not exist: this machine has {count} GPUs")
    return torch.device(name)


def place(net: Net, device: torch.device) -> Net:
    """Move a network to a device, in channels_last: 1.2 to 1.4 times faster here on CPU, and what tensor cores want."""
    return net.to(device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (torch's stub lacks it)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one CPU thread inside, so that results do not depend on the machine's number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return the context in which networks run: plain for `fp32`, mixed for `bf16`, where logits come out in bf16.

    Raises:
        UserError: another precision.
    """
    kinds = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in kinds:
        raise unknown("precision", precision, kinds)
    return torch.autocast(device.type, dtype=kinds[precision], enabled=precision != "fp32")


def mixed_seed(*parts: int | str) -> int:
    """Return a seed that depends on every part and its place, so that neighbouring runs and steps are unrelated."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Draw from a generator seeded with the parts inside, and leave the global generators as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # manual_seed seeds every GPU
        torch.manual_seed(mixed_seed(*parts))
        yield


@cache
def environment() -> dict[str, str]:
    """Return what a record needs to be repeated: versions, hardware, and the commit where there is one."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "advalign": version("advalign"),
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": gpu or f"{_processor()}, {torch.get_num_threads()} threads",
        "command": " ".join(["advalign", *sys.argv[1:]]) if Path(sys.argv[0]).stem in ("advalign", "__main__") else "",
    }


def _commit() -> str:
    here = Path(__file__).parent
    try:
        ask = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
        known = subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return ask.stdout.strip() if known.returncode == 0 else ""  # installed below somebody else's checkout


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
