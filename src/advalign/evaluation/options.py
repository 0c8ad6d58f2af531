"""What an evaluation is asked for: which network on which images (`TargetOptions`), and how attacks run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from advalign.errors import require
from advalign.spelling import check_numbers

if TYPE_CHECKING:  # the command line takes its defaults from here, and its help needs no torch
    from advalign.data import Dataset


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which network is measured, on which images, and in which threat model.

    Raises:
        UserError: `n` below 1, `mean` and `std` that do not belong together, or a number that no tensor can hold.
    """

    checkpoint: str = "best"
    """`best` or `last`, of a run folder"""
    data: str | Dataset | None = None
    """what the network was trained on if None; weights without a training record need it"""
    model: str | None = None
    """the architecture; what the weights file says if None"""
    n: int | None = None
    """number of test images, a stratified subset that is the same for every network; all if None"""
    norm: str | None = None
    """`linf`, `l2` or `l1`; the norm of training if None, and `linf` for networks that were trained without attacks"""
    eps: float | None = None
    """the radius; that of training if None, and 8/255 for networks that were trained without attacks"""
    data_dir: str | Path | None = None
    """folder of the CIFAR files"""
    image_size: int | None = None
    """side of the images of `folder:PATH`; what the network was trained on if None"""
    mean: Sequence[float] = ()
    """of each channel, for weights without a training record whose network reads normalised images"""
    std: Sequence[float] = ()
    """of each channel, as for `mean`"""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` or `mps`"""
    trust_model: bool = False
    """whether a function may be called that the weights file names as its architecture"""

    def __post_init__(self) -> None:
        check_numbers("evaluation", vars(self))
        mean, std = tuple(self.mean), tuple(self.std)
        require(self.n is None or self.n >= 1, lambda: f"n={self.n} must be at least 1")
        missing = "--std" if mean else "--mean"
        require(bool(mean) == bool(std), lambda: f"{missing} is missing: give --mean and --std, or neither")
        require(len(mean) == len(std), lambda: f"mean={mean} and std={std} must have one value for each channel each")


@dataclass(frozen=True, kw_only=True)
class AttackOptions:
    """How attacks run. The outcome depends on all three: random starts are drawn batch by batch.

    Raises:
        UserError: a batch size below 1, or a number that no tensor can hold.
    """

    batch_size: int = 512
    """images attacked at once"""
    precision: str = "fp32"
    """`fp32`, `bf16` or `fp16`, of the attacks; whether an image withstands them is always decided in fp32"""
    seed: int = 0
    """seed of the random starts"""

    def __post_init__(self) -> None:
        check_numbers("evaluation", vars(self))
        require(self.batch_size >= 1, lambda: f"batch_size={self.batch_size} must be at least 1")
