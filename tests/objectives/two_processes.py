"""One process of two: half of a batch through DDP, and the gradients that both must hold, for one method after another.

`python -m tests.objectives.two_processes RANK FOLDER METHOD...`: the processes meet by a file in the folder, and each
writes `RANK-METHOD.pt`.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tests.objectives.short_training import bound
from tests.samples import batch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from advalign.objectives import Objective, total
from advalign.threats import Linf


def half(method: str, rank: int) -> tuple[Objective, Tensor, Tensor]:
    """Return the objective in float64, ready for its epoch, and the images and labels of one process."""
    objective = bound(method).double()
    images, labels = batch(16)
    images = images.double()
    objective.start_epoch([(images, labels)], 0.0)
    return objective, images[rank::2], labels[rank::2]


def gradients(objective: Objective) -> dict[str, Tensor]:
    return {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}


def main(rank: int, folder: Path, methods: list[str]) -> None:
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    for method in methods:
        objective, x, y = half(method, rank)
        parallel = DistributedDataParallel(objective, broadcast_buffers=False)
        torch.manual_seed(rank)
        x_adv = objective.perturb(x, y, Linf(), second=x.flip(3), steps=2)
        total(parallel(x, x_adv, y, x.flip(3))).backward()
        torch.save({"x_adv": x_adv, "gradients": gradients(objective)}, folder / f"{rank}-{method}.pt")
    dist.barrier()  # else the first to end closes connections that the other may still read
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
