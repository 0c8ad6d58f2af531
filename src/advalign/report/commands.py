"""The command lines that repeat a run and its evaluations, from the files in its folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from advalign.attacks.names import parse_name
from advalign.errors import UserError
from advalign.models import function_of
from advalign.objectives import Method, parse
from advalign.report.rows import is_defense
from advalign.runs import Run
from advalign.runs.run import data_kind, run_id
from advalign.spelling import spell_number
from advalign.threats import parse_threat
from advalign.training.planning import ATTACK_FIELDS, GUEST_METHODS
from advalign.training.recipes import ADDED, RECIPES, Recipe

RunFolders = Mapping[str, Path]
"""The folder of each run below the report's paths, by id."""


def flags_of(setting: Mapping[str, Any]) -> dict[str, str]:
    """Return a run's recipe as flags, without the seed and the fields that its method does not use."""
    recipe = {**_default(), **setting["recipe"]}
    unused = () if is_defense(setting["method"]) else ATTACK_FIELDS
    return {name: " ".join(_words(value)) for name, value in recipe.items() if name not in ("seed", *unused)}


def train_line(run: Run, folders: RunFolders) -> str:
    """Return the line that trains the run again: the same setting, and so the same id.

    What the folder does not contain is a word in capitals, which a comment above explains.
    """
    setting, notes = run.setting, []
    recipe = {**_default(), **setting["recipe"]}
    if not recipe.keys() - ADDED <= setting["recipe"].keys():
        notes.append("of an earlier version with fewer settings: the same training, under another id")
    preset, flags = _nearest(recipe)
    words = [setting["method"], "--data", setting["data"], "--model", setting["model"], "--recipe", preset, *flags]
    if data_kind(setting["data"]) in ("folder", "parquet", "webdataset"):
        words += ["--image-size", str(setting["shape"][1])]
    for guest, identity in setting["guests"].items():
        if identity == "learns" or _is_default_guest(setting, guest):
            continue
        folder = folders.get(identity)
        source = str(folder) if folder else guest.upper()
        words += [f"--{guest}", source] if guest in GUEST_METHODS else ["--guest", f"{guest}={source}"]
        if folder is None:
            notes.append(f"{guest.upper()}: the run or weights file with digest {identity}, not below these paths")
    if "extra" in setting:
        words += ["--extra", "EXTRA.npz"]
        notes.append(f"EXTRA.npz: the generated images with digest {setting['extra']}")
    if "init" in setting:
        folder = folders.get(setting["init"])
        words += ["--init", str(folder or "INIT")]
        if folder is None:
            notes.append(f"INIT: the run or weights file with digest {setting['init']}, not below these paths")
    for name in setting.get("own", ()):
        words += ["--plugin", "PACKAGE.MODULE:CLASS"]
        notes.append(f"PACKAGE.MODULE:CLASS: the part {name!r} of your own")
    words += ["--runs", str(run.path.parent)]
    if not run.path.name.endswith(f"-{run.id}"):
        words += ["--name", run.path.name]
    return "\n".join((*(f"# {note}" for note in notes), shlex.join(["advalign", "train", *words])))


def repeat_frontier(content: Mapping[str, Any], folders: RunFolders) -> str:
    """Return the line that repeats a frontier, from its `frontier.json`."""
    words, notes = [], []
    for name, member in members_of(content).items():
        identity = member.get("run") or member["weights"]
        words.append(str(folders.get(identity) or name.upper()))
        if identity not in folders:
            notes.append(f"{name.upper()}: {member['method']}, the run or weights file with digest {identity}")
    threat, options = parse_threat(content["threat"]), content.get("options", {})
    shown = sum(len(content[images][0]["robust"]) for images in _measured(options))
    words += ["--method", content["method"], "--give", spell_number(content["give"])]
    words += ["--attacks", *(content["attacks"] or ["none"]), "--curve-attack", content["curve_attack"]]
    words += ["--data", content["data"], "--n", str(shown), "--norm", threat.norm, "--eps", spell_number(threat.eps)]
    words += [word for name, value in options.items() for word in _flag(name, value)]
    words += ["--trust-model"] if any(function_of(each["model"]) for each in members_of(content).values()) else []
    return "\n".join((*(f"# {note}" for note in notes), shlex.join(["advalign", "frontier", *words])))


def members_of(content: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the networks that a frontier was made from, in the order in which the command names them."""
    if content["method"] == "finetune":  # which has made the other one itself
        return {"robust": content["robust"]}
    if content["method"] == "soup":
        members = [content["robust"], content["accurate"], *content.get("further", ())]
        return {f"robust-{number}": member for number, member in enumerate(members, 1)}
    return {"robust": content["robust"], "accurate": content["accurate"]}


def frontier_line(run: Run, folders: RunFolders) -> str:
    """Return the line that makes a frontier's run again, as far as the run tells; `frontier.json` tells all."""
    setting, choice = run.setting, run.setting["frontier"]
    members = {name.upper().replace(" ", "-"): identity for name, identity in setting["guests"].items()}
    sources = [str(folders.get(identity) or name) for name, identity in members.items()]
    notes = [
        f"# {name}: the run or weights file with digest {identity}, not below these paths"
        for name, identity in members.items()
        if identity not in folders
    ]
    words = [*sources, "--method", choice["by"], "--give", spell_number(choice["give"])]
    words += ["--curve-attack", choice["attack"], "--data", setting["data"], "--runs", str(run.path.parent)]
    if "points" in choice:  # which earlier versions did not keep
        threat = parse_threat(choice["threat"])
        words += ["--points", str(choice["points"]), "--held-out", choice["held_out"]]
        words += ["--norm", threat.norm, "--eps", spell_number(threat.eps)]
    words += ["--trust-model"] if function_of(setting["model"]) else []
    return "\n".join((*notes, shlex.join(["advalign", "frontier", *words])))


def _measured(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the sets of images that were test images."""
    apart = str(options.get("held_out", "")).startswith("test:")
    return ("held_out", "test") if apart else ("test",)


def evaluate_line(source: Run | Path | None, evaluation: Mapping[str, Any], folders: RunFolders) -> str:
    """Return the line that repeats the evaluation of a result file of `advalign evaluate`.

    Args:
        source: the run, or the weights file without a training record; None if it is not below the paths.
    """
    first, attacks = evaluation["records"][0], [name for name in evaluation["outcomes"] if name != "clean"]
    threat = parse_threat(first["threat"])
    notes, surrogate = [], []
    if transferred := [name for name in map(parse_name, attacks) if name.surrogate]:
        attacks = [name.attack for name in transferred]
        label = transferred[0].surrogate
        folder = folders.get(transferred[0].surrogate_run)
        surrogate = ["--surrogate", str(folder) if folder else "SURROGATE"]
        if folder is None:
            notes.append(f"SURROGATE: the run or weights file of {label}, not below these paths")
    if isinstance(source, Run):
        words = [str(source.path), "--checkpoint", first["checkpoint"]]
    elif first["run"]:
        words = ["RUN", "--checkpoint", first["checkpoint"]]
        notes.append(f"RUN: the folder of run {first['run']}, not below these paths")
    else:
        part = f"#{evaluation['part']}" if evaluation.get("part") else ""
        words = ["--weights", f"{source or 'WEIGHTS'}{part}", "--model", first["model"]]
        if source is None:
            notes.append(f"WEIGHTS: {first['checkpoint']}, the file with digest {evaluation['weights']}")
    words += _trust_flag(source)
    words += ["--attacks", *(attacks or ["none"]), *surrogate]
    if not isinstance(source, Run) or first["data"] != source.setting["data"]:
        words += ["--data", first["data"]]
    for flag in ("mean", "std"):
        if evaluation.get(flag):
            words += [f"--{flag}", *map(spell_number, evaluation[flag])]
    until = evaluation.get("until")
    for flag, value in {
        **({"--n": first["n"]} if until is None else {"--until": spell_number(until)}),
        "--norm": threat.norm, "--eps": spell_number(threat.eps),
        "--batch-size": first["batch_size"], "--precision": first["precision"], "--seed": first["attack_seed"],
    }.items():  # fmt: skip
        words += [flag, str(value)]
    return "\n".join((*(f"# {note}" for note in notes), shlex.join(["advalign", "evaluate", *words])))


def diagnose_line(run: Run, diagnosis: Mapping[str, Any]) -> str:
    """Return the line that repeats a diagnosis of `advalign diagnose`."""
    threat = parse_threat(diagnosis["threat"])
    words = ["advalign", "diagnose", str(run.path), "--data", diagnosis["data"], "--n", str(diagnosis["n"])]
    words += [*_trust_flag(run), "--norm", threat.norm, "--eps", spell_number(threat.eps)]
    return shlex.join(words)


def _trust_flag(source: Run | Path | None) -> list[str]:
    """Return the flag that allows to call the user's function that a run's files name as its network."""
    return ["--trust-model"] if isinstance(source, Run) and function_of(source.setting["model"]) else []


def _plain(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as run.json has it, with lists for tuples."""
    return json.loads(json.dumps(asdict(recipe)))


@cache
def _default() -> Mapping[str, Any]:
    return _plain(Recipe())


@cache
def _presets() -> Mapping[str, Mapping[str, Any]]:
    return {name: _plain(make()) for name, make in RECIPES.items()}


def _nearest(recipe: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Return the preset from which a recipe differs least, and the flags of the difference."""
    flags, differences = {key: _flag(key, value) for key, value in recipe.items()}, {}
    for name, preset in _presets().items():
        if preset["norm"] == recipe["norm"] or name == "common":  # another norm's radius must not be taken over
            changed = [key for key, value in recipe.items() if value != preset[key]]
            differences[name] = [word for key in changed for word in flags[key]]
    name = min(differences, key=lambda name: len(differences[name]))
    return name, differences[name]


def _flag(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    may_be_left_open = _default().get(name, False) is None  # then it takes True or False as a word
    if isinstance(value, bool) and not may_be_left_open:
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", *_words(value)]


def _words(value: Any) -> list[str]:
    if isinstance(value, list):
        return [word for each in value for word in _words(each)]
    return [spell_number(value) if isinstance(value, float) else str(value)]


def _is_default_guest(setting: Mapping[str, Any], guest: str) -> bool:
    """Return whether a run's guest is the one that training makes by default."""
    try:
        made = GUEST_METHODS[guest](parse(setting["method"])) if guest in GUEST_METHODS else None
    except UserError:  # a part of the user's own
        return False
    return made is not None and run_id(_guest_setting(setting, made)) == setting["guests"][guest]


def _guest_setting(setting: Mapping[str, Any], method: Method) -> dict[str, Any]:
    default = {field.name: field.default for field in fields(Recipe)}
    reset = () if method.defends else ATTACK_FIELDS
    recipe = {name: default[name] if name in reset else value for name, value in setting["recipe"].items()}
    guests = {
        name: "learns" if name in method.learners else run_id(_guest_setting(setting, GUEST_METHODS[name](method)))
        for name in method.guests
    }
    kept = {key: value for key, value in setting.items() if key not in ("init", "revisions")}
    return {**kept, "method": str(method), "recipe": recipe, "guests": guests}
