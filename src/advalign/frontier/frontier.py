"""The verb: from two networks to the curve between them, a chosen setting, and a run of its own for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from advalign.attacks import Attack, parse
from advalign.attacks.names import transfer_name
from advalign.attacks.spelled import parse_attacks
from advalign.data import Images
from advalign.data.pairs import Pair
from advalign.errors import require, unknown
from advalign.evaluation.accuracy import Evaluation, Passes, PrecomputedExamples, evaluate
from advalign.evaluation.measure import write_outcomes
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.target import Target, load_target
from advalign.frontier.choose import RULE
from advalign.frontier.dial import Dial, Setting
from advalign.frontier.evidence import Evidence
from advalign.frontier.finetune import fine_tune
from advalign.frontier.members import HELD_OUT, Material, gather
from advalign.frontier.mixing import mix
from advalign.frontier.nuts import mix_nuts
from advalign.frontier.result import Frontier, write_frontier
from advalign.frontier.saved import save_run
from advalign.frontier.trace import CURVE, ON_ACCURATE, ON_ROBUST, ROBUST_TO_THE_END, Source, Stage, trace
from advalign.frontier.weights import cook_soup, interpolate
from advalign.registration import register_attacks
from advalign.runs import Run, Weights
from advalign.runtime.device import autocast, pick_device
from advalign.runtime.files import digest, require_writable
from advalign.runtime.progress import say
from advalign.threats import Linf, Threat

DIALS: dict[str, Callable[[Material], Dial]] = {
    "mix": mix,
    "mixednuts": mix_nuts,
    "weights": interpolate,
    "finetune": fine_tune,
    "soup": cook_soup,
}
MOST_ROBUST_RUNS = 9


def frontier(
    robust: str | Path | Weights | nn.Module,
    *others: str | Path | Weights | nn.Module,
    method: str = "mix",
    points: int = 11,
    give: float = 1.0,
    attacks: Sequence[str] = ("autoattack",),
    curve_attack: str = CURVE,
    held_out: int | str | Images | Pair = HELD_OUT,
    images: Images | Pair | None = None,
    threat: Threat | None = None,
    target_options: TargetOptions | None = None,
    attack_options: AttackOptions | None = None,
    runs: str | Path | None = None,
    out: str | Path | None = None,
    console: Console | None = None,
) -> Frontier:
    """Trade robust for clean accuracy after training: the curve between two networks, and the best setting on it.

    Settings are attacked on images that neither network was trained on, and one is chosen there: that of the highest
    clean accuracy at a robust accuracy at most `give` points below the robust network's. Then all are measured on the
    test images, each under the examples made on every other. An interrupted call is resumed by the same call.

    Example:
        >>> import advalign as aa
        >>> recipe = aa.Recipe(epochs=1, steps=1, subset=64, validation=16)
        >>> run = aa.train("trades+vfd", data="digits", model="small-cnn(width=2)", recipe=recipe)
        >>> traced = aa.frontier(run.path, points=3, attacks=["fgsm"], curve_attack="fgsm", held_out=16)

    Args:
        robust: a run folder, a weights file, or `MODEL@FILE`; or a network, and then all are networks, images
            (N, C, H, W) in [0, 1] to logits (N, K).
        others: as `robust`, the accurate network; the vanilla guest that the robust run has learned from if not given.
            None for `finetune`, and further robust networks for `soup`.
        method: how the two become one; see `advalign list frontiers`.
        points: settings on the curve, about so many with the two networks and the chosen one; two or three times as
            many are attacked on the held-out images.
        give: points of robust accuracy, per cent, that may be lost on the held-out images.
        attacks: spellings; on the test images, the chosen setting and the robust network are attacked by these too.
        curve_attack: the attack on every setting.
        held_out: the number of training images at most to choose on; `test:N` to set N test images apart for it, or
            the name of another data set. Of networks, images with labels that none was trained on.
        images: of networks, the test images with labels, on the networks' device.
        threat: of networks, the threat model.
        runs: folder for the run of the chosen network; that of the robust run, else `runs`, if None. What is made of
            networks is no run: nobody could build it from its folder.
        out: folder of the result; below `frontiers`, named by its content, if None.

    Raises:
        UserError: anything that cannot work, before the first attack.
    """
    which, how = target_options or TargetOptions(), attack_options or AttackOptions()
    console = console or Console(quiet=True)
    autocast(pick_device(which.device), how.precision)
    _check_asked(method, 1 + len(others), points, give, which)
    chosen_attacks = _bounded(parse_attacks(map(register_attacks, attacks), Linf()))
    (on_curve,) = _bounded([parse(register_attacks(curve_attack), threat=Linf())])

    members, chosen_on, where = gather(
        (robust, *others), held_out, images, threat, which, console, alone=method == "finetune"
    )
    h = members[0]
    chosen_by = (method, points, give, *map(str, (*chosen_attacks, on_curve, h.threat, how)), len(h.images))
    identity = digest(*(f"{each} | " for each in (*chosen_by, where, *map(_identity, members))))
    folder = Path(out) if out else Path("frontiers") / _slug(method, members, identity)
    examples = folder / "examples" if out else folder.parent / "examples"  # which several results may share
    require_writable(folder)
    root = Path(runs) if runs else h.path.parent.parent if "run" in h.card else Path("runs")
    require_writable(root)

    material = Material(members, chosen_on, how, folder, console)
    dial = DIALS[method](material)
    g = members[1] if len(members) > 1 else _accurate_end(h, dial)
    of_choice, of_test = (
        Stage(name, dial, Evidence(part, h.threat, how.batch_size), how, examples, console)
        for name, part in (("held-out", chosen_on), ("test", h.images))
    )
    for stage in (of_choice, of_test):
        stage.attack_members(h.net, g.net)
    curve, chosen = trace(of_choice, on_curve.with_threat(h.threat), points, give)
    warnings = dial.warnings(of_choice.evidence)
    for line in warnings:
        say(console, f"warning: {line}")
    settings = [point.setting for point in curve.points]
    of_test.attack_views()
    of_test.attack_settings(settings, on_curve.with_threat(h.threat))
    for attack in chosen_attacks:
        of_test.attack_settings([dial.robust, settings[chosen]], attack.with_threat(h.threat))
    made = None
    if not isinstance(robust, nn.Module):
        choice = {
            "by": method, "give": give, "attack": str(on_curve), "setting": dict(settings[chosen].values),
            "points": points, "held_out": str(held_out), "threat": str(h.threat),
        }  # fmt: skip
        made = save_run(
            dial.network(settings[chosen]), dial.spelling(settings[chosen], h.model, g.model),
            f"{method}({', '.join(member.method for member in members)}, {settings[chosen]})",
            _parts(method, members), material.seen, choice, root,
        )  # fmt: skip
        _write_evaluation(made, of_test, settings[chosen], (h, g), which, how)
    about = {
        **_about(members, g, on_curve, chosen_attacks), "images_held_out": where, "give": give,
        "rule": RULE.format(give=give), "warnings": warnings,
        "options": {
            "points": points, "held_out": "" if isinstance(robust, nn.Module) else str(held_out),
            "checkpoint": which.checkpoint, "batch_size": how.batch_size, "precision": how.precision, "seed": how.seed,
        },
    }  # fmt: skip
    traced = Frontier(dial, curve, of_test.curve(settings), chosen, made, folder, about)
    write_frontier(traced)
    return traced


def _about(
    members: Sequence[Target], accurate: Target, curve_attack: Attack, attacks: Sequence[Attack]
) -> dict[str, Any]:
    """Return what the result says of the networks, the data and the attacks."""
    robust = members[0]
    return {
        "robust": _member(robust),
        "accurate": _member(accurate),
        "further": [_member(member) for member in members[2:]],
        "data": robust.dataset.name,
        "images": robust.dataset.digest,
        "threat": str(robust.threat),
        "curve_attack": str(curve_attack),
        "attacks": [str(attack) for attack in attacks],
        "note": robust.note,
    }


def _check_asked(method: str, networks: int, points: int, give: float, options: TargetOptions) -> None:
    """Refuse what no networks could make possible."""
    _check_number(method, networks)
    require(
        not options.mean,
        "a frontier takes no mean and std, as each network has its own: name weights of normalised images as "
        "normalized(model=..., mean=..., std=...)@FILE",
    )
    require(3 <= points <= 101, lambda: f"points={points} must be in 3 to 101")
    require(0 <= give <= 100, lambda: f"give={give:g} must be in 0 to 100: points of robust accuracy")


def _check_number(method: str, networks: int) -> None:
    """Refuse an unknown method, and a number of networks that it does not take."""
    if method not in DIALS:
        raise unknown("method", method, DIALS)
    least, most, what = {
        "finetune": (1, 1, "the robust network alone"),
        "soup": (2, MOST_ROBUST_RUNS, f"2 to {MOST_ROBUST_RUNS} robust networks"),
    }.get(method, (1, 2, "a robust network and an accurate one"))
    require(least <= networks <= most, lambda: f"method={method} takes {what}, not {networks} networks")


def _accurate_end(robust: Target, dial: Dial) -> Target:
    """Return, as something measured, the accurate network of a dial that makes it from the robust one."""
    net = dial.network(dial.accurate)
    tensors = [tensor.detach().cpu().contiguous().numpy().data for tensor in net.state_dict().values()]
    card = {key: value for key, value in robust.card.items() if key != "run"}
    card["method"] = f"{dial.name}({robust.method}, {dial.accurate})"
    return replace(robust, net=net, card=card, digest=digest(*tensors))


def _parts(method: str, members: Sequence[Target]) -> dict[str, Target]:
    """Name the members, as the run's folder keeps them."""
    if method == "soup":
        return {f"robust {number}": member for number, member in enumerate(members, 1)}
    return dict(zip(("robust", "accurate"), members, strict=False))


def _bounded(attacks: Sequence[Attack]) -> list[Attack]:
    for attack in attacks:
        require(attack.bounded, lambda each=attack: f"{each} may leave the threat model: name attacks that stay in it")
    return list(attacks)


def _write_evaluation(
    run: Run, stage: Stage, setting: Setting, members: tuple[Target, Target], which: TargetOptions, how: AttackOptions
) -> None:
    """Write what the chosen network withstands into its run's folder, as `advalign evaluate` does."""
    h, g = members
    options = replace(
        which, data=h.dataset, model=None, norm=h.threat.norm, eps=h.threat.eps, checkpoint="best", trust_model=True
    )  # fmt: skip
    target = replace(load_target(run.path, options), images=stage.evidence.images)
    labels = {ON_ROBUST: h.label, ROBUST_TO_THE_END: h.label, ON_ACCURATE: g.label}
    own = {name: source for name, source in stage.sources.items() if source.network == str(setting)}
    names = {
        name: source.attack
        if name in own
        else transfer_name(source.attack, labels.get(source.network, f"{stage.dial.name}({source.network})"))
        for name, source in stage.sources.items()
    }
    shown = {names[name]: PrecomputedExamples(stage.evidence.sets[name], h.threat) for name in names}
    evaluation = evaluate(
        target.net, target.images, precomputed=shown, batch_size=how.batch_size, precision=how.precision, seed=how.seed
    )
    made_on = {"frontier": stage.evidence.fingerprint(target.net)}
    write_outcomes(target, _with_costs(evaluation, own), how, identity=made_on, folder=run.path / "evaluations")


def _with_costs(evaluation: Evaluation, own: Mapping[str, Source]) -> Evaluation:
    """Return the evaluation with what the attacks on this very network have taken."""
    costs = {source.attack: source.cost for source in own.values() if source.cost is not None}
    return replace(
        evaluation,
        seconds={**evaluation.seconds, **{name: cost.seconds for name, cost in costs.items()}},
        passes={**evaluation.passes, **{name: Passes(cost.forward, cost.backward) for name, cost in costs.items()}},
        trails={name: cost.trail for name, cost in costs.items() if cost.trail},
    )


def _identity(target: Target) -> tuple[str, ...]:
    return target.digest, target.part, target.model, str(target.net.__class__.__name__)


def _member(target: Target) -> dict[str, Any]:
    return {
        "method": target.method, "model": target.model, "weights": target.digest, "run": target.card.get("run", "")
    }  # fmt: skip


def _slug(method: str, members: Sequence[Target], identity: str) -> str:
    methods = "-".join(member.method for member in members)
    names = re.sub(r"[^\w.+=-]+", "_", f"{method}-{methods}-{members[0].dataset.name.partition(':')[0]}")
    return f"{names[:120]}-{identity[:8]}"
