"""What every attack promises: inside the threat model, nothing of the caller's changed, repeatable, never weaker."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attacks.spellings import DETERMINISTIC, QUICK
from tests.networks import TinyNet, fooled, own_labels, sharp, tiny
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import ATTACKS, FAB, FABT, FGSM, MIM, PGD, STANDARD, Attack, CarliniWagner, Square, parse
from advalign.attacks.apgd import APGDCE, APGDDLR, APGDT
from advalign.attacks.ascent import AttackLoss, NoGradient, projected_gradient_ascent
from advalign.errors import UserError
from advalign.objectives import compose
from advalign.objectives.bases.trades import TRADES
from advalign.threats import L1, L2, Linf, Threat, make_threat

SPELLINGS = [
    *(QUICK.get(name, name) for name in ATTACKS),
    *STANDARD,
    'pgd(loss="kl")',
    "pgd(start=gaussian)",
    "pgd(start=clean, restarts=2)",
    "pgd(until_fooled=False)",
    "mim(decay=0)",
    "square(queries=9, loss=ce, restarts=2)",
    "apgd-margin(steps=10, targets=2, start=odi)",
    "cw(c=0.01, steps=20, lr=0.2, search=4, abort=true)",
]
THREATS = [Linf(8 / 255), L2(0.5)]
ALL_THREATS = [*THREATS, L1(3.0)]


def quick_first(spellings: list[str]) -> list[Any]:
    """Gradients, queries and distances at once, the others as slow tests: the contract is kept in one place."""
    some = ("fgsm", "pgd", QUICK["square"], QUICK["fab-t"], QUICK["cw"])
    return [each if each in some else pytest.param(each, marks=pytest.mark.slow) for each in spellings]


def in_all_threats(spellings: list[str]) -> list[Any]:
    """Each spelling in one threat, by turns, and in the others as slow tests."""
    quick = [(spelling, ALL_THREATS[k % 3]) for k, spelling in enumerate(spellings)]
    others = [(spelling, ALL_THREATS[(k + shift) % 3]) for k, (spelling, _) in enumerate(quick) for shift in (1, 2)]
    return quick + [pytest.param(*each, marks=pytest.mark.slow) for each in others]


def reach(attack: Attack) -> Threat:
    """How far its images may be: anywhere in the box, if nothing bounds it."""
    return attack.threat if attack.bounded else Linf(1)


def assert_inside(x_adv: Tensor, x: Tensor, threat: Threat) -> None:
    assert x_adv.shape == x.shape
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    gap = (x_adv - x).flatten(1)
    norms = {"linf": gap.abs().amax(1), "l2": gap.square().sum(1).sqrt(), "l1": gap.abs().sum(1)}
    rounding = 1e-5 if threat.norm == "l1" else 1e-6  # the sum of that of all entries
    assert (norms[threat.norm] <= threat.eps + rounding).all()


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(sorted(ATTACKS.keys() - {"autoattack", "fast"})),  # made of the others, at full length
    norm_eps=st.one_of(
        st.tuples(st.just("linf"), st.floats(0, 1, allow_subnormal=False)),
        st.tuples(st.just("l2"), st.floats(0, 20, allow_subnormal=False)),
        st.tuples(st.just("l1"), st.floats(0, 200, allow_subnormal=False)),
    ),
    steps=st.integers(1, 4),
    share=st.one_of(st.none(), st.floats(1e-3, 2)),
    start=st.sampled_from(["uniform", "unclamped", "gaussian", "clean"]),
    until_fooled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_stays_in_the_ball_and_in_the_box(name, norm_eps, steps, share, start, until_fooled, seed):
    threat = make_threat(*norm_eps)
    step_size = (share or 0) * threat.eps or None
    given = {"steps": steps, "step_size": step_size, "start": start, "until_fooled": until_fooled, "threat": threat}
    given |= {"queries": 5 * steps}
    fields = {field.name for field in dataclasses.fields(ATTACKS[name])}  # pyright: ignore[reportArgumentType]
    if name == "apgd-margin":
        given["start"] = "uniform" if start == "uniform" else "odi"
    attack = ATTACKS[name](**{key: value for key, value in given.items() if key in fields})
    x, y = batch(4)
    x[0] = x[0].round()  # at the walls
    torch.manual_seed(seed)
    assert_inside(attack(sharp(), x, y), x, reach(attack))


@pytest.mark.parametrize(("spelling", "threat"), in_all_threats(SPELLINGS))
def test_moves_images_leaves_its_input_and_repeats_with_the_seed(spelling: str, threat: Threat, x_y):
    x, _ = x_y
    net = sharp()
    y = own_labels(net, x)
    attack = parse(spelling, threat=threat)
    before = x.clone()
    results = []
    for tracked in (False, True):
        torch.manual_seed(5)
        given = x.clone().requires_grad_(tracked)
        results.append(attack(net, given, y))
        assert torch.equal(given, before)
        assert given.requires_grad == tracked
        assert given.grad is None
    assert torch.equal(*results)
    assert not results[1].requires_grad
    moved = (results[0] != x).flatten(1).any(1)
    assert moved[fooled(net, results[0], y)].all()
    assert (
        moved.all() or attack.name.startswith("fab") or bool(attack.nearest)
    )  # which return the clean image where they fail


def state_path(net: nn.Module) -> tuple[object, ...]:
    parameters = list(net.parameters())
    return (
        [module.training for module in net.modules()],
        [parameter.requires_grad for parameter in parameters],
        [None if parameter.grad is None else parameter.grad.tolist() for parameter in parameters],
        {key: value.tolist() for key, value in net.state_dict().items()},
    )


def unusual_net() -> TinyNet:
    net = tiny(0).train()
    net.layer1.eval()
    net.layer2[0].weight.requires_grad_(False)
    net.fc.bias.grad = torch.arange(4.0)
    return net


@pytest.mark.parametrize("spelling", quick_first(SPELLINGS))
def test_the_model_is_left_as_it_was_found(spelling: str, x_y):
    net = unusual_net()
    before = copy.deepcopy(state_path(net))
    parse(spelling, threat=Linf())(net, *x_y)
    assert state_path(net) == before


@pytest.mark.parametrize("spelling", quick_first(SPELLINGS))
def test_the_model_is_left_as_it_was_found_when_it_fails(spelling: str, x_y):
    net = unusual_net()
    before = copy.deepcopy(state_path(net))

    def fail(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise RuntimeError("out of memory")

    net.fc.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        parse(spelling, threat=Linf())(net, *x_y)
    assert state_path(net) == before


@pytest.mark.parametrize("spelling", quick_first(SPELLINGS))
def test_runs_in_eval_mode_on_a_training_model_and_inside_no_grad(spelling: str, x_y):
    x, y = x_y
    attack = parse(spelling, threat=Linf())
    found, training = tiny(0).eval(), tiny(0).train()
    torch.manual_seed(1)
    plain = attack(found, x, y)
    torch.manual_seed(1)
    with torch.no_grad():
        assert torch.equal(attack(training, x, y), plain)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("spelling", DETERMINISTIC)
def test_images_do_not_depend_on_their_neighbours(spelling: str, threat: Threat):
    x, _ = batch(9)
    net, x = sharp().double(), x.double()
    y = own_labels(net, x)
    attack = parse(spelling, threat=threat)
    whole = attack(net, x, y)
    parts = torch.cat([attack(net, x[:4], y[:4]), attack(net, x[4:], y[4:])])
    torch.testing.assert_close(whole, parts, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("spelling", "threat"), in_all_threats(SPELLINGS))
def test_an_empty_batch_stays_empty(spelling: str, threat: Threat, x_y):
    x, y = x_y
    assert parse(spelling, threat=threat)(sharp(), x[:0], y[:0]).shape == (0, 3, 8, 8)


def iterates(
    net: nn.Module, x: Tensor, y: Tensor, threat: Linf, start: Tensor, steps: int, step_size: float
) -> list[Tensor]:
    """Every iterate of Madry et al.'s loop from the start on."""
    found = [start]
    for _ in range(steps):
        point = found[-1].clone().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(point), y, reduction="sum"), point)
        moved = point.detach() + step_size * grad.sign()
        found.append(torch.minimum(torch.maximum(moved, x - threat.eps), x + threat.eps).clamp(0, 1))
    return found


def test_until_fooled_keeps_the_first_iterate_that_fools():
    x, _ = batch(192)
    x = x.double()
    net, threat, steps, step_size = sharp().double(), Linf(0.06), 5, 0.003
    y = own_labels(net, x)
    torch.manual_seed(2)
    start = (x + torch.empty_like(x).uniform_(-threat.eps, threat.eps)).clamp(0, 1)
    path = iterates(net, x, y, threat, start, steps, step_size)
    wrong = torch.stack([fooled(net, point, y) for point in path])
    first = [next((k for k in range(steps) if wrong[k, i]), steps) for i in range(len(x))]
    assert {0, steps} < set(first)  # at the start, on the way, never
    assert not wrong[steps].all()
    expected = torch.stack([path[k][i] for i, k in enumerate(first)])
    torch.manual_seed(2)
    kept = PGD(threat, steps=steps, step_size=step_size)(net, x, y)
    torch.testing.assert_close(kept, expected, atol=1e-12, rtol=0)
    torch.manual_seed(2)
    last = PGD(threat, steps=steps, step_size=step_size, until_fooled=False)(net, x, y)
    torch.testing.assert_close(last, path[-1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("threat", [Linf(0.03), L2(0.3)], ids=str)
@pytest.mark.parametrize(
    ("loss", "start"),
    [(loss, start) for loss in ("ce", "margin", "kl") for start in ("uniform", "gaussian", "clean")][:-1],
)
def test_until_fooled_breaks_every_image_that_the_last_iterate_breaks(threat: Threat, start, loss):
    x, y = batch(48)
    net = sharp()
    y[:40] = own_labels(net, x)[:40]  # some are wrong from the start
    broken = []
    for until_fooled in (False, True):
        torch.manual_seed(3)
        attack = PGD(threat, steps=4, step_size=threat.eps, start=start, loss=loss, until_fooled=until_fooled)
        broken.append(fooled(net, attack(net, x, y), y))
    plain, ours = broken
    assert (ours >= plain).all()
    assert plain.any()
    assert not plain.all()


def test_a_gaussian_start_outside_the_box_is_never_the_answer():
    x, _ = batch(16)
    x, net = x.round(), sharp()
    y = (own_labels(net, x) + 1) % 4  # wrong from the start
    x_adv = PGD(Linf(1e-4), start="gaussian")(net, x, y)
    assert_inside(x_adv, x, Linf(1e-4))


@pytest.mark.parametrize("until_fooled", [True, False])
@pytest.mark.parametrize("threat", [Linf(0.02), L2(0.15)], ids=str)
def test_restarts_never_raise_accuracy(threat: Threat, until_fooled: bool):
    x, _ = batch(96)
    net = sharp()
    y = own_labels(net, x)
    broken = []
    for restarts in (1, 2, 5):
        torch.manual_seed(4)
        attack = PGD(threat, steps=1, step_size=threat.eps, restarts=restarts, until_fooled=until_fooled)
        broken.append(fooled(net, attack(net, x, y), y))
    for fewer, more in pairwise(broken):
        assert (more >= fewer).all()
    assert broken[2].sum() > broken[0].sum() > 0


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_restarts_end_when_every_image_is_broken(threat: Threat, x_y):
    x, _ = x_y
    net = sharp()
    calls: list[int] = []
    net.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    y = (own_labels(net, x) + 1) % 4
    calls.clear()
    x_adv = PGD(threat, start="clean", restarts=9)(net, x, y)
    assert torch.equal(x_adv, x)
    assert calls == [8, 8]  # the attack sees them fooled; the first restart finds none left


class Flat(nn.Module):
    """Logits that do not move, with a gradient of zero."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]) + 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize(("spelling", "threat"), in_all_threats(SPELLINGS))
def test_zero_gradients_make_no_nan(spelling: str, threat: Threat, x_y):
    x, _ = x_y
    attack = parse(spelling, threat=threat)
    assert_inside(attack(Flat(), x, torch.zeros(8, dtype=torch.int64)), x, reach(attack))


@pytest.mark.parametrize("spelling", sorted(ATTACKS))
@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (lambda x: x * 2 - 1, r"images lie in \[-1, 1\]"),
        (lambda x: x * 255, r"images lie in \[0, 255\]"),
        (lambda x: x.masked_fill(x > 0.9, torch.nan), r"images lie in \[nan, nan\]"),
    ],
)
def test_images_outside_the_box_are_refused(spelling: str, bad: Callable[[Tensor], Tensor], words: str, x_y):
    x, y = x_y
    x[0, 0, 0, :2] = torch.tensor([0.0, 1.0])
    x = bad(x)
    with pytest.raises(UserError, match=words):
        parse(spelling, threat=Linf())(sharp(), x, y)


def test_mixed_precision_does_not_stop_a_climb_that_fp32_would_go_on_with():
    """Logits 1.000 and 1.001 are one number in bf16, so the image seems fooled before it has moved."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    linear = net[1]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.ones(12), torch.zeros(12)]))
        linear.bias.copy_(torch.tensor([1.0 - 6, 1.001]))
    x, y = torch.full((1, 3, 2, 2), 0.5), torch.tensor([1])
    assert not fooled(net, x, y)
    attacks: list[Attack] = [PGD(Linf(0.1), start="clean"), MIM(Linf(0.1)), PGD(Linf(0.1), start="clean", restarts=2)]
    attacks += [APGDCE(Linf(0.1)), APGDDLR(Linf(0.1)), APGDT(Linf(0.1))]
    attacks += [FAB(Linf(0.1)), FABT(Linf(0.1))]
    attacks += [Square(Linf(0.1), queries=20), Square(L2(0.5), queries=20), CarliniWagner(Linf(0.1), steps=20)]
    for attack in attacks:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert net(x).diff().item() == 0
            x_adv = attack(net, x, y)
        assert fooled(net, x_adv, y)
        assert x_adv.dtype == torch.float32


@pytest.mark.parametrize("name", sorted(ATTACKS))
def test_registered_attacks_keep_their_name_and_arguments(name: str):
    attack = parse(name, threat=Linf())
    assert attack.name == name
    steps = {"ddn": 100, "fmn": 200}.get(name) or (100 if name.startswith(("apgd", "fab", "min-margin")) else 20)
    defaults = {"square": "square(queries=5000)", "cw": "cw(steps=1000)", "apgd-margin": "apgd-margin(steps=40)"}
    defaults |= {each: each for each in ("fgsm", "autoattack", "fast")}
    assert str(attack) == defaults.get(name, f"{name}(steps={steps})")
    assert attack == ATTACKS[name](threat=Linf())


@pytest.mark.parametrize("spelling", [*SPELLINGS, "pgd(steps=3, step_size=2/255, restarts=4)", "mim(decay=0.25)"])
def test_spelling_round_trips(spelling: str):
    attack = parse(spelling, threat=L2(1.0))
    assert parse(str(attack), threat=L2(1.0)) == attack
    assert str(parse(str(attack), threat=Linf())) == str(attack)


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("pgd( steps = 20 )", "pgd(steps=20)"),
        ("pgd(restarts=2, steps=7)", "pgd(steps=7, restarts=2)"),
        ("pgd(loss=margin)", 'pgd(steps=20, loss="margin")'),
        ("pgd(step_size=0.00784313725490196)", "pgd(steps=20, step_size=2/255)"),
        ("mim(decay=1)", "mim(steps=20)"),
        ("square(p_init=0.3)", "square(queries=5000, p_init=0.3)"),
        ("cw(search=9, c=1e-3)", "cw(c=0.001, steps=1000, search=9)"),
        ("fgsm(target=3)", "fgsm(target=3)"),
        ("pgd(target=least-likely)", 'pgd(steps=20, target="least-likely")'),
        ("mim(target='next')", 'mim(steps=20, target="next")'),
        ("cw(target=random)", 'cw(steps=1000, target="random")'),
    ],
)
def test_spelling_is_canonical(spelling: str, canonical: str):
    assert str(parse(spelling, threat=Linf())) == canonical


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("pdg", "unknown attack 'pdg': did you mean 'pgd'? choose from "),
        ("pgd(steps=0)", "steps=0 must be at least 1"),
        ("mim(steps=-3)", "steps=-3 must be at least 1"),
        ("mim(steps=0)", "mim: steps=0"),
        ('pgd(steps="many")', "steps='many' must be a whole number"),
        ("pgd(steps=2.5)", "steps=2.5 must be a whole number"),
        ("pgd(steps=true)", "steps=True must be a whole number"),
        ("pgd(step=2)", "unknown argument of attack 'pgd' 'step': did you mean 'steps'?"),
        ("autoattack(steps=2)", "takes no arguments"),
        ("fgsm(steps=2)", "unknown argument of attack 'fgsm' 'steps': choose from target"),
        ("pgd(target=-1)", "pgd: target=-1 must be a class, 0 or above"),
        ("cw(target=-1)", "cw: target=-1 must be a class"),
        ("mim(target=nxt)", "unknown target of attack 'mim' 'nxt': did you mean 'next'? choose from least-likely"),
        ("pgd(target=1.5)", "target=1.5 must be"),
        ("pgd(loss=kl, target=3)", "target needs another loss"),
        ("pgd(threat=1)", "unknown argument"),
        ("pgd(restarts=0)", "restarts=0 must be at least 1"),
        ("pgd(step_size=0)", "must be above 0"),
        ("pgd(step_size=-1/255)", "must be above 0"),
        ("pgd(step_size=1e999)", "step_size=inf"),
        ("pgd(loss=mse)", "unknown loss of attack 'pgd' 'mse'"),
        ("pgd(start=middle)", "'middle': choose from clean, gaussian, unclamped, uniform"),
        ("mim(decay=-1)", "decay=-1"),
        ("square(queries=0)", "square: queries=0 must be at least 1"),
        ("square(restarts=0)", "square: restarts=0 must be at least 1"),
        ("square(p_init=1.5)", "square: p_init=1.5 must be above 0 and at most 1"),
        ("square(loss=kl)", "unknown loss of attack 'square' 'kl': choose from ce, margin"),
        ("square(steps=3)", "unknown argument of attack 'square' 'steps'"),
        ("cw(c=0)", "cw: c=0.0 must be above 0"),
        ("cw(kappa=-1)", "cw: kappa=-1.0 must be at least 0"),
        ("cw(steps=0)", "cw: steps=0 must be at least 1"),
        ("cw(lr=0)", "cw: lr=0.0 must be above 0"),
        ("cw(search=-1)", "cw: search=-1 must be at least 0"),
        ("pgd(steps=2, steps=3)", "steps is given twice"),
        ("pgd+mim", "one name was expected, not 2"),
        ("pgd(20)", "cannot read"),
    ],
)
def test_refusals_name_the_value_and_what_is_allowed(spelling: str, words: str):
    with pytest.raises(UserError) as caught:
        parse(spelling, threat=Linf())
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "fields", "words"),
    [
        (
            PGD,
            {"start": "unifrom"},
            "unknown start of pgd 'unifrom': did you mean 'uniform'? choose from clean, gaussian",
        ),
        (PGD, {"loss": "dlr"}, "unknown loss of pgd 'dlr': choose from ce, kl, margin"),
        (PGD, {"steps": 2.5}, "pgd: steps=2.5 must be a whole number"),
        (PGD, {"until_fooled": "no"}, "pgd: until_fooled='no' must be true or false"),
        (MIM, {"steps": "many"}, "mim: steps='many' must be a whole number"),
        (MIM, {"decay": "slow"}, "mim: decay='slow' must be a number"),
    ],
)
def test_wrong_arguments_from_python_are_refused_when_the_attack_is_made(make, fields, words: str):
    with pytest.raises(UserError) as caught:
        make(Linf(), **fields)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def climb(x: Tensor, y: Tensor, **given) -> Tensor:
    attack_loss = AttackLoss(sharp(), lambda logits, y: F.cross_entropy(logits, y, reduction="none"), y)
    return projected_gradient_ascent(
        attack_loss, x, Linf(0.1), **{"steps": 1, "step_size": 0.1, "start": "clean", **given}
    )


@pytest.mark.parametrize("steps", [0, -1])
@pytest.mark.parametrize("start", ["clean", "gaussian", "unclamped"])
def test_a_climb_has_a_step_at_least(steps: int, start: str, x_y):
    with pytest.raises(UserError, match=f"steps={steps} must be at least 1"):
        climb(*x_y, steps=steps, start=start)
    assert_inside(climb(*x_y, start=start), x_y[0], Linf(0.1))


def test_an_unknown_start_is_refused(x_y):
    with pytest.raises(UserError, match="unknown start 'unifrom': did you mean 'uniform'"):
        climb(*x_y, start="unifrom")
    x, y = x_y
    objective = compose(TRADES(), student=tiny(0))
    with pytest.raises(UserError, match="unknown start 'unifrom'"):
        objective.perturb(x, y, Linf(), start="unifrom")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="steps=0 must be at least 1"):
        objective.perturb(x, y, Linf(), steps=0)


def test_fgsm_is_one_whole_step_of_pgd(x_y):
    x, y = x_y
    for threat in THREATS:
        pgd = PGD(threat, steps=1, step_size=threat.eps, start="clean", until_fooled=False)
        torch.testing.assert_close(FGSM(threat)(sharp(), x, y), pgd(sharp(), x, y))


class Counting(TinyNet):
    """Changes its buffers in eval mode: counts its calls in place and anew, and keeps a norm in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("anew", torch.zeros(()))
        self.calls: Tensor
        self.anew: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.anew = self.anew + 1
        self.layer2[1].train()
        return super().forward(x)


@pytest.mark.parametrize("spelling", quick_first(SPELLINGS))
def test_buffers_that_a_forward_changes_come_back(spelling: str, x_y):
    net = Counting()
    before = copy.deepcopy(state_path(net))
    parse(spelling, threat=Linf())(net, *x_y)
    assert state_path(net) == before


def test_an_attack_between_forward_and_backward_does_no_harm(x_y):
    x, y = x_y
    net = tiny(0).eval()
    loss = F.cross_entropy(net(x), y)
    PGD(Linf(), steps=1)(net, x, y)
    loss.backward()  # autograd refuses where a buffer was written meanwhile
    assert net.fc.weight.grad is not None


class Sick(nn.Module):
    """A sharp network whose gradient is not a number for images whose first pixel is bright."""

    def __init__(self) -> None:
        super().__init__()
        self.net = sharp()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda grad: grad.masked_fill(x[:, :1, :1, :1] > 0.5, torch.nan))
        return self.net(x)


GRADIENT = [each for each in SPELLINGS if not each.startswith(("square", "worst"))]


@pytest.mark.parametrize(("spelling", "threat"), in_all_threats(GRADIENT))
def test_a_gradient_that_is_not_finite_counts_as_zero(spelling: str, threat: Threat):
    """And the other images of the batch are attacked as if it were not there."""
    x, _ = batch(9)
    bright = torch.arange(9) % 3 == 0
    x[:, 0, 0, 0] = bright.float()
    net = sharp()
    y = own_labels(net, x)
    attack = parse(spelling, threat=threat)
    x_adv = attack(Sick(), x, y)
    assert_inside(x_adv, x, reach(attack))
    if spelling in DETERMINISTIC:
        torch.testing.assert_close(x_adv[~bright], attack(net, x, y)[~bright], atol=1e-5, rtol=0)
        torch.testing.assert_close(x_adv[bright], x[bright], atol=2e-6, rtol=0)


@pytest.mark.parametrize("spelling", quick_first(GRADIENT))
def test_a_graph_that_is_cut_counts_as_a_gradient_of_zero_and_warns(spelling: str, x_y):
    x, _ = x_y
    net = sharp()
    y = own_labels(net, x)
    net.register_forward_hook(lambda module, args, logits: logits.detach())
    attack = parse(spelling, threat=Linf())
    with pytest.warns(NoGradient, match="no gradient by the image"):
        assert_inside(attack(net, x, y), x, reach(attack))


def test_square_gets_its_turn_after_a_gradient_attack_that_could_do_nothing():
    x, _ = batch(32)
    net = sharp()
    y = own_labels(net, x)
    net.register_forward_hook(lambda module, args, logits: logits.detach())
    with pytest.warns(NoGradient):
        x_adv = parse("worst(fgsm, square(queries=50))", threat=Linf(0.1))(net, x, y)
    assert fooled(net, x_adv, y).sum() > 5


@pytest.mark.parametrize("name", ["pgd", "mim"])
def test_a_step_that_crosses_the_ball_is_refused(name: str, x_y):
    x, y = x_y
    with pytest.raises(UserError, match=rf"{name}: step_size=2 crosses .* in \[0, 1\] write 2/255"):
        parse(f"{name}(step_size=2)", threat=Linf(8 / 255))(sharp(), x, y)
    parse(f"{name}(step_size=2)", threat=L2(1.0))(sharp(), x, y)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1, 3, 10])
def test_fp16_is_as_strong_as_fp32(scale: float, target):
    """A natural network is so sure that the gradient of its softmax is below what fp16 holds."""
    net = nn.Sequential(target.model, Scaled(4 * scale))
    x, y = target.x[:100], target.y[:100]
    spellings = ["fgsm", "pgd(steps=10)", "mim(steps=10)", "apgd-ce(steps=10)", "apgd-t(steps=5, targets=2)"]
    for spelling in [*spellings, "fab-t(steps=5, targets=2)", "cw(c=0.3, steps=40)"]:
        for threat in THREATS_OF_DIGITS:
            broken = []
            for precise in (True, False):
                torch.manual_seed(0)
                with torch.autocast("cpu", dtype=torch.float16, enabled=not precise):
                    x_adv = parse(spelling, threat=threat)(net, x, y)
                broken.append(int(fooled(net, x_adv, y).sum()))
            assert abs(broken[0] - broken[1]) <= 2, (spelling, threat, broken)
            assert broken[0] > 5, (spelling, threat)


THREATS_OF_DIGITS = [Linf(0.2), L2(1.0)]


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, logits: Tensor) -> Tensor:
        return self.scale * logits


def test_what_overflows_in_fp16_is_taken_in_fp32(x_y):
    x, _ = x_y
    net = nn.Sequential(sharp(), Scaled(1e6))
    y = own_labels(net, x)
    plain = PGD(Linf(0.1), loss="margin", start="clean")(net, x, y)
    with torch.autocast("cpu", dtype=torch.float16):
        half = PGD(Linf(0.1), loss="margin", start="clean")(net, x, y)
    assert fooled(net, plain, y).any()
    assert torch.equal(fooled(net, half, y), fooled(net, plain, y))
