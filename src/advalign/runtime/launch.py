"""Several processes of one command on this machine, as torchrun starts them: the ranks of a run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from advalign.errors import TrainingError

ENDED = "ADVALIGN_ENDED"
"""The variable that names the folder in which launched processes note how they end."""
PATIENCE = str(60 * 60)
"""Seconds until a process that was asked to stop is killed: a step or a validation may take long to come to an end."""


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `advalign` with some arguments in `count` processes; return the exit code of the first one that fails, or 0.

    SIGTERM and Ctrl-C are handed on to all of them, which end by themselves. Where one fails, the others are stopped.

    Raises:
        TrainingError: one was killed, or has not ended by itself when it was asked to.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault(
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", PATIENCE
    )  # known from torch 2.12 on; before, 30 s are fixed
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    with TemporaryDirectory() as folder:
        os.environ[ENDED] = folder
        try:
            elastic_launch(config, sys.executable)("-m", "advalign", *arguments)
        except ChildFailedError as error:
            number, failure = error.get_first_failure()
            if failure.exitcode < 0:
                raise _lost(number, f"was ended by {signal.Signals(-failure.exitcode).name}") from None
            return failure.exitcode
        except SignalException:  # torch does not say how the processes have ended
            return _code_of_all(Path(folder), count)
        finally:
            del os.environ[ENDED]
    return 0


def note_end(code: int) -> None:
    """Note for the process that has launched this one, if any, that it ends by itself with an exit code."""
    if folder := os.environ.get(ENDED):
        with suppress(OSError):  # it has gone, and nobody asks
            Path(folder, os.environ["RANK"]).write_text(str(code))


def _code_of_all(folder: Path, count: int) -> int:
    """Return the exit code of processes that were asked to stop, of the first one that has not done so in good order.

    Raises:
        TrainingError: one did not end by itself.
    """
    ends = [folder / str(number) for number in range(count)]
    for number, end in enumerate(ends):
        if not end.exists():
            raise _lost(number, "has not ended by itself")
    return next((code for end in ends if (code := int(end.read_text()))), 0)


def _lost(rank: int, how: str) -> TrainingError:
    return TrainingError(
        f"rank {rank} {how}; what was saved last is kept, and the same command goes on, with any number of devices"
    )
