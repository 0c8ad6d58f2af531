"""Several processes of one command on this machine, as torchrun starts them: the ranks of a run."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence

from advalign.errors import TrainingError


def launch(arguments: Sequence[str], count: int) -> int:
    """Run `advalign` with some arguments in `count` processes; return the exit code of the first one that fails, or 0.

    SIGTERM and Ctrl-C are handed on to all of them. Where one fails, the others are stopped.

    Raises:
        TrainingError: one was killed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what failed is said in one line
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, run_id=uuid.uuid4().hex, rdzv_backend="c10d",
        rdzv_endpoint="localhost:0", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "advalign", *arguments)
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise TrainingError(
                f"rank {number} was ended by {name}; what was saved last is kept, and the same command goes on, with "
                "any number of devices"
            ) from None
        return failure.exitcode
    except SignalException:  # the processes have saved what they had
        return 0
    return 0
