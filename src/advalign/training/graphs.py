"""What cannot be recorded as a CUDA graph, and why: a recording repeats kernels, and no decision of Python."""

from __future__ import annotations

import torch

from advalign.errors import require
from advalign.training.attacks import training_attack
from advalign.training.recipes import Recipe

NOT_CAPTURED: dict[str, str] = {
    "free": "--attack free keeps its perturbation in another tensor after each step",
    "atta": "--attack atta looks up each image's perturbation by its place, which is no tensor",
    "fgsm-pgi": "--attack fgsm-pgi looks up each image's perturbation by its place, which is no tensor",
    "cycle_momentum": "--cycle-momentum changes a number of the optimiser in each step",
    "fp16": "--precision fp16 goes back to fp32 for the images whose gradient it cannot hold, as many as there are",
    "compile": "--compile records graphs of its own",
}
"""Training attacks and settings of the recipe that `--cuda-graphs` refuses. Every base and plug-in can be recorded."""


def check_captured(recipe: Recipe, device: torch.device) -> None:
    """Refuse to record CUDA graphs where it cannot work.

    Raises:
        UserError: another device than a GPU, or a recipe that is not the same kernels in each step.
    """
    require(device.type == "cuda", lambda: f"CUDA graphs need a CUDA device, not {device.type!r}")
    used = {
        training_attack(recipe).name: True,
        "cycle_momentum": recipe.cycle_momentum,
        recipe.precision: True,
        "compile": recipe.compile,
    }
    for name, reason in NOT_CAPTURED.items():
        require(not used.get(name), lambda: f"CUDA graphs cannot be recorded: {reason}")
