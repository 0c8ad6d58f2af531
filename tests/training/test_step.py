"""A step, plain and recorded: CUDA graphs with the recording itself replaced by one on the CPU, as there is no GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tests.objectives.short_training import bound, combinations, every_part_quick, mirrored
from tests.recording import record, tensors_of
from tests.samples import batch
from torch import Tensor

from advalign.errors import UserError
from advalign.runtime.cuda_graphs import WARM_UPS, CudaGraphed
from advalign.training.attacks import CHEAP
from advalign.training.graphs import NOT_CAPTURED, check_captured
from advalign.training.recipes import Recipe, digits
from advalign.training.step import Step
from advalign.training.train import train

RECIPE = Recipe(epochs=3, schedule="onecycle", lr=0.05, nesterov=True, steps=2, awp=0.01, awp_start=1, clip_norm=5.0)


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a recording be one on the CPU, which repeats kernels and nothing else; how many there were."""
    count: list[int] = []

    def recorded(function: Any, inputs: list[Tensor | None]) -> Callable[[], Any]:
        count.append(1)
        return record(function, inputs, _state(getattr(function, "__self__", None)))

    monkeypatch.setattr("advalign.runtime.cuda_graphs._record", recorded)
    monkeypatch.setattr("advalign.runtime.cuda_graphs._aside", lambda function, tensors: function(*tensors))
    return count


def _state(step: Step | None) -> list[Tensor]:
    """Everything that a step changes."""
    if step is None:
        return []
    kept = tensors_of([list(state.values()) for state in step.optimizer.state.values()])
    return [*step.objective.parameters(), *step.objective.buffers(), *kept, *step.attack.state().values()]


def trained(
    method: str, recipe: Recipe = RECIPE, epochs: int = 3, *, cuda_graphs: bool
) -> tuple[list[float], list[Tensor]]:
    """Epochs of four steps; the losses, and the weights and statistics."""
    objective = bound(method)
    step = Step(objective, recipe, 4, torch.device("cpu"), cuda_graphs=cuda_graphs)
    losses = []
    for epoch in range(epochs):
        x, y = batch(8)
        objective.start_epoch([(x, y)], epoch / 3)
        step.start_epoch(epoch)
        for k in range(4):
            at = 4 * epoch + k
            torch.manual_seed(at)
            step.schedule(at)
            x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
            second = mirrored(objective, x) if objective.method.second else None
            loss, _ = step.update(x, step.perturb(x, y, second), y, second, torch.arange(8) + k)
            losses.append(loss.item())
    return losses, [tensor.detach().clone() for tensor in (*objective.parameters(), *objective.buffers())]


FAST = ("at", "at+sglr(begin=0.3)")
SLOW = (
    *(each for each in every_part_quick(combinations(0) + combinations(1)) if isinstance(each, str) and each != "at"),
    *("mart+lbgat", "at+ar-at", "at+rebat(begin=0.5)", "adaad+igdm", "mtard(balanced=true)"),
    "at+generalist(begin=0.3, every=1, share_end=0)",
)


@pytest.mark.parametrize("method", [*FAST, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)])
def test_recorded_steps_give_the_same_bits(method: str, recordings: list[int]):
    epochs = 3 if "(" in method else 2  # that what begins late has begun
    losses, weights = trained(method, epochs=epochs, cuda_graphs=False)
    assert not recordings
    found, same = trained(method, epochs=epochs, cuda_graphs=True)
    assert len(recordings) == 2 * epochs  # attack and update, each epoch anew
    assert found == losses
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def recipe_with(setting: str, value: Any) -> Recipe:
    return Recipe(**{setting: value})


def test_what_python_decides_is_not_recorded_and_so_refused(recordings: list[int]):
    """The test of the test above, on a setting that a recording cannot follow; and each such setting is refused."""
    swinging = replace(RECIPE, cycle_momentum=True)
    plain, recorded = (trained("at", swinging, 2, cuda_graphs=graphs)[0] for graphs in (False, True))
    assert recordings
    assert plain != recorded
    gpu, settings = torch.device("cuda"), {field.name for field in fields(Recipe)}
    for name, reason in NOT_CAPTURED.items():
        setting = name if name in settings else "precision" if name == "fp16" else "attack"
        recipe = recipe_with(setting, True if name == setting else name)
        with pytest.raises(UserError, match=reason):
            check_captured(recipe, gpu)
    for attack in CHEAP.keys() - NOT_CAPTURED.keys():
        check_captured(Recipe(attack=attack), gpu)


def test_a_recording_is_made_once_a_shape_and_reads_what_it_is_given(recordings: list[int]):
    calls: list[tuple[int, ...]] = []

    def double(x: Tensor, other: Tensor | None) -> Tensor:
        calls.append(tuple(x.shape))
        return 2 * x if other is None else 2 * x + other

    recorded = CudaGraphed(double)
    for k in range(WARM_UPS + 3):
        assert torch.equal(recorded(torch.full((2,), k), None), torch.full((2,), 2 * k))
    assert len(recordings) == 1
    assert torch.equal(recorded(torch.ones(3), torch.ones(3)), torch.full((3,), 3.0))
    assert len(recordings) == 2
    first = recorded(torch.ones(3), torch.ones(3))
    assert recorded(torch.zeros(3), torch.ones(3)) is first  # overwritten, as the class says


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("method", ["at", "trades+vfd", "at+ar-at"])
def test_graphs_give_what_the_plain_steps_give_on_a_gpu(method: str):
    recipe = replace(RECIPE, awp=0.0)
    losses = []
    for cuda_graphs in (False, True):
        objective = bound(method).cuda()
        step = Step(objective, recipe, 8, torch.device("cuda"), cuda_graphs=cuda_graphs)
        x, y = (each.cuda() for each in batch(8))
        objective.start_epoch([(x, y)], 0)
        step.start_epoch(0)
        found = []
        for k in range(8):
            torch.manual_seed(k)
            step.schedule(k)
            second = x.flip(3) if objective.method.second else None
            found.append(step.update(x, step.perturb(x, y, second), y, second)[0].detach().clone())
        losses.append(torch.stack(found))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)


def test_graphs_are_refused_where_they_cannot_be(tmp_path):
    with pytest.raises(UserError, match="CUDA graphs need a CUDA device, not 'cpu'"):
        train("at", data="digits", model="small-cnn", recipe=digits(), runs=tmp_path, device="cpu", cuda_graphs=True)
    assert not list(tmp_path.iterdir())


def clean_share(passes: list[bool], momentum: float = 0.1) -> float:
    """The share of the clean images in a running mean that has seen the same passes in each of many steps."""
    share = 0.0
    for _ in range(200):
        for clean in passes:
            share = (1 - momentum) * share + momentum * clean
    return share


@pytest.mark.parametrize(
    ("method", "passes", "mode", "updates", "share"),
    [
        ("at", "loss", "eval", 1, 0.0),
        ("at", "rice", "train", 13, 0.13),  # as measured on the code of Rice et al.
        ("at", "pang", "eval", 3, 0.70),  # as measured on that of Pang et al.
        ("ard", "clean", "eval", 2, 0.1 / (1 - 0.9**2)),  # x', x
        ("trades", "clean", "eval", 3, (0.1 + 0.081) / (1 - 0.9**3)),  # x, x', x
    ],
)
def test_batchnorm_sees_the_passes_that_the_authors_run_beside_the_loss(
    method: str, passes: Any, mode: Any, updates: int, share: float
):
    objective = bound(method)
    seen: list[Tensor] = []
    objective.student.register_forward_pre_hook(lambda net, args: seen.append(args[0]) if net.training else None)
    step = Step(objective, Recipe(epochs=1, batchnorm_passes=passes, mode=mode), 1, torch.device("cpu"))
    step.schedule(0)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    step.update(x, step.perturb(x, y, None), y, None)
    order = [torch.equal(images, x) for images in seen]
    assert len(order) == updates
    assert clean_share(order) == pytest.approx(share, abs=0.005)


def test_passes_beside_the_loss_move_statistics_alone():
    weights = []
    for passes in ("loss", "clean", "rice"):
        objective = bound("trades+ar-at")
        step = Step(objective, Recipe(epochs=1, batchnorm_passes=passes), 1, torch.device("cpu"))
        step.schedule(0)
        torch.manual_seed(0)
        x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
        step.update(x, step.perturb(x, y, None), y, None)
        weights.append([parameter.detach().clone() for parameter in objective.parameters()])
    for others in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))


def test_the_first_batch_sets_the_statistics_and_the_next_count_as_given():
    """As the code of Wang et al.: momentum 1 in the first step, .01 from the second on."""
    objective = bound("at")
    step = Step(objective, Recipe(epochs=1, batchnorm_momentum=0.01), 3, torch.device("cpu"))
    norm = next(module for module in objective.student.modules() if isinstance(module, torch.nn.BatchNorm2d))
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda net, args: seen.append(args[0].mean((0, 2, 3))) if net.training else None)
    expected = None
    for at in range(3):
        step.schedule(at)
        x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
        step.update(x, step.perturb(x, y, None), y, None)
        expected = seen[-1] if expected is None else 0.99 * expected + 0.01 * seen[-1]
        torch.testing.assert_close(norm.running_mean, expected)
    assert len(seen) == 3


def test_a_radius_that_grows_is_that_of_acats_code():
    """Their epochs are counted from 1: varepsilon = epsilon * (epoch / epochs), and the step is as long."""
    objective = bound("trades")
    recipe = Recipe(epochs=4, steps=2, step_size=8 / 255, eps_ramp=True)
    step = Step(objective, recipe, 1, torch.device("cpu"))
    x, y = 0.2 + 0.6 * torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    for epoch, share in ((0, 1 / 4), (1, 1 / 2), (3, 1.0)):
        step.start_epoch(epoch)
        moved = (step.perturb(x, y, None) - x).abs().max().item()
        assert moved == pytest.approx(share * 8 / 255, rel=1e-4)
        assert step.threat.eps == pytest.approx(share * 8 / 255)
    assert step.step_size == recipe.step_size
    step.start_epoch(0)
    again = Step(objective, replace(recipe, step_size=None), 1, torch.device("cpu"))
    again.start_epoch(0)
    assert again.step_size is None  # a quarter of the radius that it has grown to
