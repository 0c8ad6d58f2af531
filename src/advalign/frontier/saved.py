"""The network of a setting as a run of its own: a folder that every command takes like any other."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from advalign.data import NAMES, Images
from advalign.evaluation.target import Target
from advalign.runs import Run, Weights
from advalign.runs.checkpoint import save_weights
from advalign.runs.run import data_kind, run_id
from advalign.runs.trained_on import write_trained_on
from advalign.runtime.environment import environment

_OF_ROBUST = ("recipe", "epochs", "seed", "training_images", "extra")
"""What the card says of the robust network's training."""


def save_run(
    net: nn.Module,
    model: str,
    method: str,
    members: Mapping[str, Target],
    seen: Sequence[Images],
    options: Mapping[str, Any],
    root: Path,
) -> Run:
    """Write a network with its card, self-contained: the weights of all its members are in one file.

    Args:
        model: its spelling.
        method: how it is called in tables.
        members: by their part, `robust` first.
        seen: the images on which the setting was chosen, and those that the network was made with; like those that the
            members have seen, no command measures on them.
        options: what the setting was chosen by; part of what names the run.
        root: folder of run folders.

    Raises:
        UserError: a file cannot be written.
    """
    robust = next(iter(members.values()))
    dataset = robust.dataset
    names = {"class_names": list(robust.classes.class_names)} if dataset.sources else {}
    images = dataset.digest if dataset.name in NAMES else dataset.training_digest
    setting = {
        "method": method,
        "data": dataset.name,
        "model": model,
        "classes": len(robust.classes.class_names),
        "shape": dataset.shape,
        "images": images,
        "recipe": _recipe(robust),
        "guests": {name: member.card.get("run", member.digest) for name, member in members.items()},
        "frontier": options,
        **names,
    }
    setting = json.loads(json.dumps(setting))
    run = Run.at(root, setting, _folder_name(method, setting))
    about = {"class_names": list(robust.classes.class_names), "preprocessing": dict(dataset.preprocessing)}
    of_robust = {key: robust.card[key] for key in _OF_ROBUST if key in robust.card}
    card = {
        **of_robust,
        **{key: setting[key] for key in ("method", "data", "model", "classes", "shape", "images")},
        **about,
        "channels": dataset.shape[0],
        "norm": robust.threat.norm,
        "eps": robust.threat.eps,
        "run": run.id,
        "checkpoint": "best",
    }
    run.path.mkdir(parents=True, exist_ok=True)
    save_weights(run.weights("best"), net, card)
    run.write_card("finished", environment(), about)
    write_trained_on(run, seen, [Weights(member.path) for member in members.values()])
    return run


def _folder_name(method: str, setting: Mapping[str, Any]) -> str:
    """Return a short name: the spellings of all members in the model would be too long for a file system."""
    label = re.sub(r"[^\w.+=-]+", "_", f"{method}-{data_kind(setting['data'])}".replace("/255", "of255")).strip("_")
    return f"{label[:100].strip('_')}-{run_id(setting)}"


def _recipe(robust: Target) -> dict[str, Any]:
    """Return the recipe of the robust run; of weights without a training record a seed alone, which runs need."""
    folder = robust.path.resolve().parent
    if "run" in robust.card and (folder / "run.json").is_file():
        return dict(Run.read(folder).setting.get("recipe", {"seed": 0}))
    return {"seed": 0}
