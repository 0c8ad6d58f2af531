"""A compiled step is one graph: no message, no tap and no check of a part breaks it, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from tests.networks import tiny
from tests.objectives.short_training import begun
from torch import Tensor

from advalign.attacks.ascent import projected_gradient_ascent
from advalign.objectives import Objective, parse, total
from advalign.threats import Linf

METHODS = ("trades+vfd", "at+ar-at", "hat+lbgat", "mart+kd", "at+adr", "mtard")
THREAT = Linf(8 / 255)


@pytest.fixture(autouse=True)
def as_users_compile() -> Iterator[None]:
    """A fresh compiler, and no shape checks, which users do not have and the compiler cannot follow."""
    torch.compiler.reset()
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


def bound(spelling: str) -> Objective:
    method = parse(spelling)
    guests = {name: tiny(seed) for seed, name in enumerate(method.guests, 1)}
    return begun(Objective(method, tiny(0), guests).train())


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_step_compiles_without_a_graph_break(method: str, x_y: tuple[Tensor, Tensor]):
    x, y = x_y
    plain, compiled = bound(method), bound(method)
    compiled.compile(fullgraph=True, backend="aot_eager")
    made: list[Tensor] = []
    for objective in (plain, compiled):
        torch.manual_seed(0)
        made.append(objective.perturb(x, y, THREAT, steps=2))
    x_adv = made[0]
    torch.testing.assert_close(made[1], x_adv, rtol=0, atol=0)
    loss, compiled_loss = total(plain(x, x_adv, y)), total(compiled(x, x_adv, y))
    torch.testing.assert_close(compiled_loss, loss, rtol=0, atol=0)
    loss.backward()
    compiled_loss.backward()
    for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_whole_attack_compiles_without_a_graph_break(method: str, x_y: tuple[Tensor, Tensor]):
    x, y = x_y
    objective = bound(method).eval()
    nets = {name: objective.nets[name] for name in objective.nets}
    attack_loss = objective.method.base.attack_loss(nets, {"clean": x}, y)

    def attack(images: Tensor) -> Tensor:
        return projected_gradient_ascent(attack_loss, images, THREAT, steps=2, step_size=2 / 255, start="clean")

    expected = attack(x)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        found = torch.compile(attack, fullgraph=True, backend="eager")(x)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found, x)
