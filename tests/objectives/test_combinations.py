"""Any base with any plug-in and any pair of them: they train, they commute, and what makes no sense is refused."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.objectives.short_training import (
    bound,
    combinations,
    every_part_quick,
    losses,
    mirrored,
    pairs_once,
    step,
    views_of,
)
from tests.objectives.two_processes import gradients, half
from tests.samples import batch

from advalign.errors import UserError
from advalign.objectives import BASES, PLUGINS, Method, parse, total

SINGLE = combinations(0) + combinations(1)
QUICK_FIRST = every_part_quick(SINGLE)
QUICK_PAIR = "trades+ar-at+vfd"
PAIRS = [each if each == QUICK_PAIR else pytest.param(each, marks=pytest.mark.slow) for each in pairs_once()]
ALL = [*QUICK_FIRST, *PAIRS]


@pytest.mark.slow
@pytest.mark.parametrize("method", ALL)
def test_trains_three_steps_and_gradient_reaches_exactly_what_learns(method: str):
    objective = bound(method)
    before = {key: value.clone() for key, value in objective.double().state_dict().items()}
    assert all(map(math.isfinite, losses(objective, 3)))
    trainable = dict(objective.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in trainable.values())
    after = objective.state_dict()
    idle = [f"nets.{guest}." for guest in objective.method.guests if guest not in objective.method.learners]
    for key, value in before.items():
        if key.startswith(tuple(idle)):
            assert torch.equal(value, after[key]), key
    moved = [key for key, p in trainable.items() if p.requires_grad and not torch.equal(before[key], after[key])]
    assert moved


@pytest.mark.parametrize("method", ALL)
def test_each_declared_pass_runs_once(method: str):
    objective, count = bound(method), Counter[str]()
    for name, net in objective.nets.items():
        net.register_forward_hook(lambda *_, name=name: count.update([name]))
    x, y = batch()
    objective(x, views_of(objective, x.flip(2)), y, mirrored(objective, x))
    assert count == Counter(need.net for need in objective.method.needs)
    assert len(set(objective.method.needs)) == len(objective.method.needs)


@pytest.mark.parametrize("method", PAIRS)
def test_the_order_of_plug_ins_does_not_matter(method: str):
    base, first, second = method.split("+")
    turned = Method(BASES[base](), [PLUGINS[second](), PLUGINS[first]()])
    assert str(turned) == str(parse(method)) == str(parse(f"{base}+{second}+{first}"))
    x, y = batch()
    x_adv, found = (x + 0.02).clamp(0, 1).double(), []
    for reverse in (False, True):
        objective = bound(method).double()
        objective.method.plugins = tuple(sorted(objective.method.plugins, key=lambda p: p.name, reverse=reverse))
        second = mirrored(objective, x.double())
        found.append(total(objective(x.double(), views_of(objective, x_adv), y, second)).item())
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.slow
@pytest.mark.weekly
def test_every_pair_of_plug_ins_on_every_base():
    for method in combinations(2):
        test_trains_three_steps_and_gradient_reaches_exactly_what_learns(method)
        test_each_declared_pass_runs_once(method)
        test_the_order_of_plug_ins_does_not_matter(method)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("trades+bgat+lbgat", "bgat and lbgat each decide what supervises the labels; take one"),
        ("trades+kd+ar-at", "ar-at and kd each decide what supervises the labels; take one"),
        ("rslad+kd", "'kd' takes the place of hard labels, but rslad has none"),
        ("adaad+bgat", "'bgat' takes the place of hard labels, but adaad has none"),
        ("score+adr", "'adr' softens cross entropies, and 'score' has none"),
        ("trades+qub", "it bounds the cross entropy of adversarial images, and trades has none"),
        ("trades+adr+rebat", "adr and rebat each keep an average of the student; take one"),
        ("at+afa+consistency", "'afa' reads the second augmentation, which is attacked as well; take one"),
        ("at+adr+sglr", "adr and sglr each put soft targets in the place of hard labels; take one"),
        ("at+bgat+qub", "'qub' changes the terms on hard labels, and 'bgat' drops them"),
        ("at+kd(robust=0.8, vanilla=0.2)+sglr", "'sglr' changes the terms on hard labels, and 'kd' drops them"),
        ("trades+adr+lbgat", "'adr' changes the terms on hard labels, and 'lbgat' drops them"),
        ("at+consistency+sglr", "each image comes several times a step, and one label would be kept for all"),
        ("at+dajat+sglr", "each image comes several times a step, and one label would be kept for all"),
        ("trades+consistency+dajat", "consistency and dajat each attack further augmentations; take one"),
        ("trades+ar-at+dajat", "ar-at and dajat each give the student norms for parts of a batch; take one"),
        ("at+afa+dajat", "'afa' reads the second augmentation, which is attacked as well; take one"),
        ("natural+dajat", "'dajat' reads adversarial examples, but 'natural' makes none"),
        ("trades+adaad", "its attack asks a robust teacher, and trades has none"),
        ("ard+adaad+afa(attack=contrast)", "adaad and afa each replace the loss of the attack; take one"),
        ("adaad+adaad", "adaad has this attack itself"),
        ("natural+kd", "'kd' reads adversarial examples, but 'natural' makes none"),
        ("natural+part", "'part' reads adversarial examples, but 'natural' makes none"),
        ("at+part+ar-at(noisy_clean=true)", "ar-at and part each replace the threat model of the attack; take one"),
        ("contrast+vfd", "'contrast' is the first stage of afa, so no plug-in joins it"),
        ("afa+ar-at", "'afa' trains the last layer alone, so no plug-in joins it"),
        ("trades+vfd(eq6=true)", "eq6 adds clean cross entropy, which trades has"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(method: str, reason: str):
    with pytest.raises(UserError) as caught:
        parse(method)
    assert reason in str(caught.value)


OF_CROSS_ENTROPIES = {"adr", "qub", "sglr"}  # plug-ins that change the cross entropies of a base


def test_what_is_allowed_is_no_accident():
    """The table of combinations: who joins whom. A new part changes it knowingly."""
    joins = {base: {name for name in PLUGINS if f"{base}+{name}" in SINGLE} for base in BASES}
    about_labels = {"adr", "sglr", "ar-at", "bgat", "kd", "lbgat"}
    for base, names in joins.items():
        part, refused = BASES[base](), set[str]()
        if not part.supervises:
            refused |= about_labels
        if not part.cross_entropy:
            refused |= OF_CROSS_ENTROPIES
        if "adv" not in part.supervises:
            refused |= {"qub"}
        if base not in ("ard", "rslad", "iad", "iad2", "mtard"):
            refused |= {"adaad"}
        assert names == (set() if base in ("natural", "contrast", "afa") else PLUGINS.keys() - refused), base


PROCESS: Any = {
    "env": {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    "stderr": subprocess.PIPE,
    "text": True,
}
GOLDEN = Path(__file__).parent / "golden.json"


@pytest.mark.parametrize("method", QUICK_FIRST)
def test_five_steps_give_the_losses_they_always_gave(method: str):
    """Against refactorings that change what is computed; `python -m tests.objectives.test_combinations` writes anew."""
    assert losses(bound(method), 5) == pytest.approx(json.loads(GOLDEN.read_text())[method], rel=1e-6)


# In a process of its own, with the library imported first: shape checks, which begin with the import of the tests, are
# nothing that dynamo can trace.
COMPILED = """
import sys, torch, advalign.objectives
from tests.samples import batch
from tests.objectives.short_training import bound, step
backend, tolerance, methods = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
for method in methods:
    torch._dynamo.reset()
    plain, compiled = bound(method), bound(method)
    compiled.compile(fullgraph=True, backend=backend)
    for objective in (plain, compiled):
        objective.start_epoch([batch()], 0.0)
    for seed in range(2):
        expected, found = (step(objective, seed) for objective in (plain, compiled))
        assert abs(expected - found) <= tolerance * abs(expected), method
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        if one.requires_grad:
            assert (one.grad - other.grad).norm() <= tolerance * one.grad.norm(), method
"""


def check_compiled(backend: str, tolerance: float, *methods: str) -> None:
    command = [sys.executable, "-c", COMPILED, backend, str(tolerance), *methods]
    done = subprocess.run(command, **PROCESS, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.weekly
def test_compiled_gives_the_same_to_the_bit():
    """Without a break of the graph, through what cuts and transforms it as on a GPU, for every base and plug-in."""
    check_compiled("aot_eager", 0.0, *SINGLE, "mtard(balanced=true)")


@pytest.mark.slow
@pytest.mark.weekly
def test_compiled_to_machine_code_gives_the_same():
    check_compiled("inductor", 1e-3, "trades+vfd", "mart+lbgat")


@pytest.mark.slow
@pytest.mark.parametrize("method", QUICK_FIRST)
def test_mixed_precision_gives_finite_losses_and_gradients(method: str):
    objective = bound(method)
    with torch.autocast("cpu", torch.bfloat16):
        objective.start_epoch([batch()], 0.0)
        assert math.isfinite(step(objective, 0))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.parameters() if p.requires_grad)


TWO_PROCESSES = ("trades+vfd", "at+ar-at", "hat+lbgat", "mart+kd", "trades+afa", "rslad+vfd")


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The examples and gradients of two processes, each with half of a batch, for every method of TWO_PROCESSES."""
    folder = tmp_path_factory.mktemp("halves")
    command = [sys.executable, "-m", "tests.objectives.two_processes"]
    loopback = "lo0" if sys.platform == "darwin" else "lo"  # not the machine's name, which may not resolve
    environment = {**PROCESS["env"], "GLOO_SOCKET_IFNAME": loopback}
    workers = [
        subprocess.Popen([*command, str(rank), str(folder), *TWO_PROCESSES], **{**PROCESS, "env": environment})
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=300)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("method", TWO_PROCESSES)
def test_two_processes_hold_the_mean_of_their_gradients(method: str, halves: Path):
    saved = [torch.load(halves / f"{rank}-{method}.pt") for rank in range(2)]
    alone: list[dict[str, torch.Tensor]] = []
    for rank in range(2):
        objective, x, y = half(method, rank)
        total(objective(x, saved[rank]["x_adv"], y, x.flip(3))).backward()
        alone.append(gradients(objective))
    assert saved[0]["gradients"].keys() == alone[0].keys()
    for name, gradient in saved[0]["gradients"].items():
        assert torch.equal(gradient, saved[1]["gradients"][name])
        torch.testing.assert_close(gradient, (alone[0][name] + alone[1][name]) / 2, atol=1e-10, rtol=1e-8)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({method: losses(bound(method), 5) for method in SINGLE}, indent=1) + "\n")
