"""What to write down about the machine and the code, so that a number can be measured again."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch


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
        "command": _command(sys.argv[1:]) if Path(sys.argv[0]).stem in ("advalign", "__main__") else "",
    }


def _command(arguments: list[str]) -> str:
    """Return the command as a shell reads it, without the paths of this machine.

    A path below the working folder becomes relative to it, and of others only the name is kept, as `DIR/name`.
    """
    return shlex.join(["advalign", *(_ABSOLUTE.sub(_relative, argument) for argument in arguments)])


_ABSOLUTE = re.compile(r"(?:(?<=^)|(?<=[=:@\"']))/[^:@=\"']+")


def _relative(match: re.Match[str]) -> str:
    path = Path(match[0])
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return f"DIR/{path.name}"


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
    return ask.stdout.strip() if known.returncode == 0 else ""  # installed below the checkout of another project


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
