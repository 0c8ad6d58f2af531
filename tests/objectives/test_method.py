"""Methods as values: spelling, composition, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.networks import tiny
from tests.samples import batch
from torch import Tensor

import advalign as aa
from advalign.errors import UserError
from advalign.objectives import BASES, PLUGINS, compose, parse, total
from advalign.objectives.contract import ADV, CLEAN, Need, Outputs, Term, Terms
from advalign.objectives.method import PlugIn


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("trades", "trades"),
        ("trades(beta=6)", "trades"),
        ("at+kd(robust=0.9, vanilla=0.1)", "at+kd(robust=0.9)"),
        ("at+kd(robust=0.8, vanilla=0.2)", "at+kd(robust=0.8, vanilla=0.2)"),
        ("at+vfd(layer=(layer3, layer4.1.bn2))", 'at+vfd(layer=("layer3", "layer4.1.bn2"))'),
        ("at+vfd(layer=(0, 1))", 'at+vfd(layer=("0", "1"))'),
        ("trades( beta = 3.0 )", "trades(beta=3)"),
        ("trades(beta=1/2)+vfd(layer=layer3, weight=0.02)", 'trades(beta=0.5)+vfd(layer="layer3")'),
        ("alp(mix=0.5,beta=0.5)", "alp(beta=0.5, mix=0.5)"),
    ],
)
def test_spelling_is_canonical(spelling: str, canonical: str):
    assert str(parse(spelling)) == canonical
    assert str(parse(canonical)) == canonical


@pytest.mark.parametrize("name", [*BASES, *PLUGINS])
def test_parts_keep_their_arguments_under_their_own_names(name: str):
    part = (BASES | PLUGINS)[name]()
    assert str(part) == name
    assert part.name == name


def test_plus_composes():
    assert str(aa.TRADES(beta=4) + aa.VFD(weight=0.05)) == "trades(beta=4)+vfd(weight=0.05)"


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("tradse", "unknown method 'tradse': did you mean 'trades'? choose from adaad, "),
        ("trades+vdf", "did you mean 'vfd'"),
        ("trades(betta=6)", "did you mean 'beta'"),
        ("at(beta=6)", "takes no arguments"),
        ("trades(beta=-1)", "beta=-1 must be at least 0"),
        ('trades(beta="six")', "beta='six' must be a number"),
        ("trades(6)", "cannot read"),
        ("trades+", "cannot read"),
        ("__import__('os')", "cannot read"),
        ("trades+trades", "'trades' is a base"),
        ("vfd+trades", "'vfd' is a plug-in: put a base before it"),
        ("trades+vfd+vfd", "named twice"),
        ("natural+vfd", "'natural' makes none"),
        ("hat(reach=1)", "reach=1 must be above 1"),
        ("at+kd(robust=0.9, vanilla=0.2)", "vanilla=0.2 must be in [0, 0.1], beside robust=0.9"),
        ("at+ar-at(layer=(layer1, layer1))", "must name layers, each once"),
        ("at # +vfd", "cannot read"),
    ],
)
def test_refusals_name_the_value_and_what_is_allowed(spelling: str, words: str):
    with pytest.raises(UserError) as caught:
        parse(spelling)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_long_spelling_is_shortened_in_messages():
    long = f'vfd(layer="{"x" * 3000}")'
    for spelling, words in (
        (f"natural+{long}", "'natural' makes none"),
        (f"trades+{long}+{long}", "'vfd' is named twice"),
        (f"contrast+{long}", "so no plug-in joins it"),
    ):
        with pytest.raises(UserError) as caught:
            parse(spelling)
        assert words in str(caught.value)
        assert len(str(caught.value)) < 500


def test_missing_guest_and_unknown_layer():
    with pytest.raises(UserError, match="needs a vanilla model"):
        compose(parse("trades+vfd"), student=tiny(0))
    with pytest.raises(UserError, match="did you mean 'layer2'"):
        compose(parse("trades+vfd(layer=layer22)"), student=tiny(0), vanilla=tiny(1))


@pytest.mark.parametrize("method", ["at+part", "iad", "iad2", "mtard", "ikl", "trades+ar-at"])
def test_a_step_without_the_epochs_start_is_refused_and_not_another_method(method: str, x_y: tuple[Tensor, Tensor]):
    x, y = x_y
    guests: dict[str, Any] = {name: tiny(k) for k, name in enumerate(parse(method).guests, 1)}
    objective = compose(parse(method), student=tiny(0), **guests)
    with pytest.raises(UserError, match=r"follows the epochs: call objective.start_epoch\(batches, epoch / epochs\)"):
        objective.train()(x, x, y)
    objective.eval()(x, x, y)
    objective.start_epoch([(x, y)], 0.0)
    resumed = compose(parse(method), student=tiny(0), **guests).train()
    resumed.load_state_dict(objective.state_dict())
    for each in (objective.train(), resumed):
        each(x, x, y)


@pytest.mark.parametrize("progress", [-0.1, 1, 3])
def test_progress_is_a_share_of_the_epochs(progress: float, x_y: tuple[Tensor, Tensor]):
    with pytest.raises(UserError, match=rf"progress={progress:g} must be in \[0, 1\)"):
        compose(parse("at"), student=tiny(0)).start_epoch([x_y], progress)


def test_hat_and_vfd_share_one_vanilla_network():
    method = parse("hat+vfd")
    assert method.guests == ("vanilla",)
    assert [need for need in method.needs if need.net == "vanilla"] == [("vanilla", "adv"), ("vanilla", "clean")]


class _Guided(PlugIn):
    """A plug-in with everything the contract offers: a learning guest, a learnt module, dropped label terms."""

    name = "guided"
    GUIDE = Need("guide", "clean")
    needs = (ADV, GUIDE)
    learns = ("guide",)

    def adapt(self, student: torch.nn.Module) -> torch.nn.Module:
        self.scale = torch.nn.Parameter(torch.ones(()))
        return student

    def reweigh(self, base: Terms) -> Terms:
        return {name: term for name, term in base.items() if not term.supervises}

    def terms(self, outs: Outputs, y: Tensor) -> Terms:
        gap = outs[ADV].logits - self.scale * outs[self.GUIDE].logits
        return {"guided": Term(1.0, gap.square().mean())}


@pytest.mark.parametrize("base", ["alp", "trades", "mart", "hat"])
def test_a_plug_in_that_uses_the_whole_contract_joins_every_base(base: str):
    x, y = batch()
    objective = compose(parse(f"{base}+vfd") + _Guided(), student=tiny(0), vanilla=tiny(1), guide=tiny(2)).train()
    terms = objective(x, (x + 0.01).clamp(0, 1), y)
    assert not any(term.supervises for term in terms.values())
    total(terms).backward()
    trained = {name.split(".")[1] for name, p in objective.named_parameters() if p.grad is not None and "nets" in name}
    assert trained == {"student", "guide"}
    assert next(p for name, p in objective.named_parameters() if name.endswith("scale")).grad is not None
    kept = objective.learned_state()
    assert any("nets.guide" in key for key in kept)
    assert not any("nets.vanilla" in key for key in kept)


def test_two_objectives_of_one_method_share_nothing():
    method = parse("trades") + _Guided()
    first, second = (compose(method, student=tiny(0), guide=tiny(1)) for _ in range(2))
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_two_parts_that_name_the_same_term_are_refused():
    class Clash(PlugIn):
        name = "clash"

        def terms(self, outs: Outputs, y: Tensor) -> Terms:
            return {"kl": Term(1.0, outs[ADV].logits.sum())}

    x, y = batch()
    with pytest.raises(UserError, match="'kl'"):
        compose(parse("trades") + Clash(), student=tiny(0))(x, x, y)


class _Wrong(PlugIn):
    """Return the input."""

    name = "wrong"

    def __init__(self, gives: Any = None) -> None:
        super().__init__()
        self.gives = gives

    def terms(self, outs: Outputs, y: Tensor) -> Terms:
        given: Any = self.gives(outs) if callable(self.gives) else self.gives
        return given


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (Term(1.0, torch.zeros(())), r"terms\(\) must return a dict of Terms by name, not Term"),
        ({"wrong": torch.zeros(())}, r"term 'wrong' must be Term\(weight, value\), not Tensor"),
        ({"wrong": Term(1.0, torch.zeros(3))}, r"term 'wrong' has shape \(3,\), not that of a scalar"),
        ({"loss": Term(1.0, torch.zeros(()))}, "called 'loss', which is the name of their sum"),
        (lambda outs: outs[Need("student", "helper")], "is read but not declared"),
    ],
)
def test_a_plug_ins_first_mistakes_are_named(gives: Any, words: str):
    x, y = batch()
    plugin = _Wrong()
    plugin.gives = gives
    with pytest.raises(UserError, match=words):
        compose(BASES["trades"]() + plugin, student=tiny(0))(x, x, y)


@pytest.mark.parametrize(
    ("role", "hook"),
    [("labels", "reweigh"), ("attack_loss", "attack_loss"), ("threat", "attack_threat"), ("targets", "soft_targets"),
     ("average", "average_decay")],
)  # fmt: skip
def test_a_plug_in_that_replaces_something_writes_the_method_for_it(role: str, hook: str):
    class Half(PlugIn):
        name = "half"
        replaces = frozenset({role})  # pyright: ignore[reportAssignmentType]
        needs = (CLEAN, Need("ema", "clean")) if role == "average" else (CLEAN,)

        def terms(self, outs: Outputs, y: Tensor) -> Terms:
            return {}

    with pytest.raises(UserError, match=rf"'half' says that it replaces '{role}': write {hook}\(\.\.\.\)"):
        _ = aa.TRADES() + Half()
