"""What callers bring to an attack: their autograd mode, numeric types, layouts of memory, and networks of any kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
from tests.attacks.spellings import DETERMINISTIC, QUICK
from tests.networks import Around, fooled, own_labels, sharp, tiny
from tests.samples import batch
from torch import Tensor, nn

from advalign.attacks import ATTACKS, PGD, parse
from advalign.errors import UserError
from advalign.evaluation.accuracy import evaluate
from advalign.evaluation.checks import check_range
from advalign.evaluation.diagnose import diagnose
from advalign.objectives import compose, total
from advalign.objectives.bases.trades import TRADES
from advalign.threats import L2, Linf, Threat

EPS = 0.02
SHORT = {"pgd": "pgd(steps=5)", "mim": "mim(steps=5)", "fab": "fab(steps=5)", "fab-t": "fab-t(steps=5, targets=2)"}
SHORT = QUICK | SHORT | {f"apgd-{loss}": f"apgd-{loss}(steps=5)" for loss in ("ce", "dlr", "t")}
SPELLINGS = [*(SHORT.get(name, name) for name in ATTACKS), "pgd(steps=5, target=1)", "mim(steps=5, target=random)"]
SOME = ("pgd(steps=5)", "fab-t(steps=5, targets=2)", "square(queries=30)")
EVERY_SPELLING = pytest.mark.parametrize(  # the contract is kept in one place; the others as slow tests
    "spelling", [each if each in SOME else pytest.param(each, marks=pytest.mark.slow) for each in SPELLINGS]
)


def attacked(
    spelling: str, net: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, threat: Threat | None = None
) -> Tensor:
    torch.manual_seed(1)
    return parse(spelling, threat=threat or Linf(EPS))(net, x, y)


def sample(n: int = 16) -> tuple[nn.Module, Tensor, Tensor]:
    x, net = batch(n)[0], sharp()
    return net, x, own_labels(net, x)


@contextmanager
def without_gradients() -> Iterator[None]:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


@contextmanager
def double_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference": torch.inference_mode,
    "device": functools.partial(torch.device, "meta"),  # where tensors are made unless their device is named
    "no gradients": without_gradients,
    "double": double_by_default,
    "anomaly": functools.partial(torch.autograd.set_detect_anomaly, True),
    "deterministic": deterministic,
}
SLOW = {"deterministic": pytest.mark.slow}  # imports for seconds
EVERY_MODE = pytest.mark.parametrize("mode", [pytest.param(name, marks=SLOW.get(name, ())) for name in MODES])


@pytest.mark.parametrize(
    ("spelling", "mode"),
    [
        (each, "inference") if each in SOME else pytest.param(each, "inference", marks=pytest.mark.slow)
        for each in SPELLINGS
    ]
    + [pytest.param(each, "device", marks=pytest.mark.slow) for each in SPELLINGS if each not in SOME]
    + [pytest.param(each, mode, marks=SLOW.get(mode, ())) for each in SOME for mode in list(MODES)[1:]],
)
def test_the_callers_mode_does_not_matter(spelling: str, mode: str):
    net, x, y = sample()
    plain = attacked(spelling, net, x, y)
    with MODES[mode]():
        again = attacked(spelling, net, x, y)
        assert not again.is_inference()
    assert torch.equal(again, plain)


def test_images_made_in_inference_mode_are_attacked():
    net, x, y = sample()
    plain = attacked("pgd", net, x, y)
    with torch.inference_mode():
        given = x.clone(), y.clone()
        assert torch.equal(attacked("pgd", net, *given), plain)
        assert torch.equal(attacked("pgd(loss=kl)", net, *given), attacked("pgd(loss=kl)", net, x, y))
    assert torch.equal(attacked("pgd", net, *given), plain)  # nor outside


@EVERY_MODE
def test_evaluation_does_not_depend_on_the_callers_mode(mode: str):
    net, x, y = sample(24)
    attack_list = [PGD(Linf(EPS), steps=3), parse("square(queries=5)", threat=Linf(EPS))]
    plain = evaluate(net, (x, y), attack_list)
    assert 0 < plain.accuracies()["pgd(steps=3)"] < 1
    with MODES[mode]():
        given = (x.clone(), y.clone()) if torch.is_inference_mode_enabled() else (x, y)
        assert evaluate(net, given, attack_list).accuracies() == plain.accuracies()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["inference", "device"])
def test_diagnosis_does_not_depend_on_the_callers_mode(mode: str):
    net, (x, _) = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), batch(3)
    y = own_labels(net, x)
    plain = diagnose(net, (x, y), Linf(EPS), n=2).content()
    with MODES[mode]():
        given = (x.clone(), y.clone()) if torch.is_inference_mode_enabled() else (x, y)
        assert diagnose(net, given, Linf(EPS), n=2).content() == plain


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_training_examples_do_not_depend_on_the_callers_mode(mode):
    _, x, y = sample()
    objective = compose(TRADES(), student=tiny(0))

    copies = [copy.deepcopy(objective), objective]  # in train mode, statistics move

    def made(x: Tensor, y: Tensor) -> Tensor:
        torch.manual_seed(2)
        return copies.pop().perturb(x, y, Linf(0.1), mode=mode)

    plain = made(x, y)
    with torch.inference_mode():
        within = made(x.clone(), y.clone())
    assert torch.equal(within, plain)
    total(objective(x, within, y)).backward()  # what was made there can be trained on


def test_a_network_made_in_inference_mode_is_refused():
    _, x, y = sample()
    with torch.inference_mode():
        net = sharp()
    for refused in (
        lambda: attacked("pgd", net, x, y),
        lambda: evaluate(net, (x, y)),
        lambda: compose(TRADES(), student=net),
    ):
        with pytest.raises(UserError, match=r"'.*layer1.0.weight' was made in torch.inference_mode\(\)"):
            refused()


def test_buffers_that_a_pass_in_inference_mode_has_left_do_no_harm():
    net, x, y = sample()
    plain = attacked("pgd", net, x, y)
    norm = net.get_submodule("layer1.1")
    with torch.inference_mode():
        norm.register_buffer("running_mean", norm.get_buffer("running_mean") + 0)
    assert torch.equal(attacked("pgd", net, x, y), plain)


def test_a_lazy_network_that_has_not_run_is_refused():
    net, (x, y) = nn.Sequential(nn.Flatten(), nn.LazyLinear(4)), batch(4)
    for refused in (lambda: attacked("pgd", net, x, y), lambda: evaluate(net, (x, y))):
        with pytest.raises(UserError, match=r"'.*1.weight' has no shape yet: run the model once"):
            refused()


UNBOUNDED = (QUICK["cw"], QUICK["ddn"], QUICK["fmn"])
HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("spelling", "dtype", "of_images"),
    [pytest.param(each, torch.bfloat16, None, marks=pytest.mark.slow) for each in SPELLINGS if each not in SOME]
    + [(each, torch.bfloat16, None) for each in SOME]
    + [(each, dtype, of) for each in SOME for dtype in (torch.float16, torch.float64) for of in (torch.float32, None)],
)
def test_networks_of_any_type_are_attacked(spelling: str, dtype: torch.dtype, of_images: torch.dtype | None):
    net, x, y = sample(48)
    exact = fooled(net, attacked(spelling, net, x, y), y).sum()
    x, net = x.to(of_images or dtype), net.to(dtype)
    x_adv = attacked(spelling, net, x, y)
    assert x_adv.dtype == x.dtype
    if spelling not in UNBOUNDED:
        assert (x_adv.double() - x.double()).abs().max() <= EPS * (1 + 1e-6)
    broken = fooled(net, x_adv.to(dtype), y).sum()
    assert abs(int(broken) - int(exact)) <= (10 if x.dtype in HALVES else 5)  # images in half precision move in steps


@pytest.mark.parametrize("threat", [Linf(8 / 255), L2(0.5)], ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_images_of_any_type_stay_in_the_ball(dtype: torch.dtype, threat: Threat):
    net, x, y = sample()
    x = x.to(dtype)
    x_adv = attacked("pgd", net, x, y, threat)
    assert x_adv.dtype == dtype
    assert threat.distance(x_adv.double(), x.double()).max() <= threat.eps * (1 + 1e-6)
    assert threat.distance(x_adv.double(), x.double()).min() > 0.8 * threat.eps


def test_a_confident_half_precision_network_has_a_gradient():
    """Its softmax hands back less than fp16 holds."""
    net, x, y = sample()
    sure = Around(net, after=lambda logits: 400 * logits)
    exact = fooled(net, attacked("pgd(steps=5)", sure, x, y), y)
    half = copy.deepcopy(sure).half()
    assert fooled(net, attacked("pgd(steps=5)", half, x, y), y).sum() >= exact.sum() - 2
    assert exact.sum() > 5


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_evaluation_of_networks_of_any_type(dtype: torch.dtype):
    net, x, y = sample(48)
    attack_list = [PGD(Linf(EPS), steps=5), parse("fab-t(steps=3, targets=2)", threat=Linf(EPS))]
    exact = evaluate(net, (x, y), attack_list).accuracies()
    of_type = copy.deepcopy(net).to(dtype)
    for pair in ((x, y), (x.to(dtype), y)):
        found = evaluate(of_type, pair, attack_list).accuracies()
        assert all(abs(found[name] - exact[name]) <= 0.15 for name in exact)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32])
def test_labels_of_any_whole_type(dtype: torch.dtype):
    net, x, y = sample()
    objective = compose(TRADES(), student=tiny(0))
    assert torch.equal(PGD(Linf(EPS), start="clean")(net, x, y.to(dtype)), PGD(Linf(EPS), start="clean")(net, x, y))
    assert total(objective(x, x, y.to(dtype))) == total(objective(x, x, y))


def test_arrays_are_evaluated():
    net, x, y = sample()
    plain = evaluate(net, (x, y), PGD(Linf(EPS)))
    arrays = evaluate(net, (x.numpy(), y.numpy().astype(np.int32)), PGD(Linf(EPS)))
    assert arrays.accuracies() == plain.accuracies()
    reverse = evaluate(net, (x.flip(0).numpy()[::-1], y.byte().flip(0).numpy()[::-1]), PGD(Linf(EPS)))
    assert reverse.accuracies() == plain.accuracies()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: ((x * 255).byte(), y), "images are uint8: attacks need floats in [0, 1], x / 255 of uint8"),
        (lambda x, y: (x.numpy(), y.numpy()), "images and labels must be tensors, not ndarray and ndarray"),
        (lambda x, y: (x, y[:, None]), "whole numbers (N,), one for each of the 16 images, not int64 (16, 1)"),
        (lambda x, y: (x, y.float()), "not float32 (16,)"),
        (lambda x, y: (x, y[:9]), "not int64 (9,)"),
        (lambda x, y: (x.where(x < x.max(), 1 + 1e-5), y), "images lie in [8.64e-05, 1.00001001], but"),
        (lambda x, y: (x - x.min() - 1e-5, y), "images lie in [-1e-05, 0.9"),
    ],
)  # fmt: skip
def test_other_images_and_labels_are_refused_in_a_line(change, words: str):
    net, x, y = sample()
    with pytest.raises(UserError) as caught:
        PGD(Linf())(net, *change(x, y))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use", [lambda net, x, y: evaluate(net, (x, y)), PGD(Linf(EPS))])
def test_a_model_that_cannot_read_the_images_is_named_with_the_reason(use):
    net, x, y = sample()
    with pytest.raises(UserError, match=r"\(16, 8, 8, 3\): if they are \(N, H, W, C\), give x.permute\(0, 3, 1, 2\)"):
        use(net, x.permute(0, 2, 3, 1), y)
    half = copy.deepcopy(net).bfloat16()
    with pytest.raises(UserError, match=r"reads torch.bfloat16, and the images are torch.float32: convert them in it"):
        use(half.forward, x, y)
    with pytest.raises(RuntimeError, match="of its own"):
        use(fails, x, y)


def fails(x: Tensor) -> Tensor:
    raise RuntimeError("of its own")


def test_pixels_outside_by_rounding_are_clamped():
    net, x, y = sample()
    above = x.where(x < x.flatten(1).amax(1).view(-1, 1, 1, 1), 1 + 2**-23)
    assert above.max() > 1
    x_adv = PGD(Linf(EPS))(net, above, y)
    assert x_adv.max() <= 1
    found, plain = (evaluate(net, (each, y), PGD(Linf(EPS))).accuracies() for each in (above, above.clamp(0, 1)))
    assert found == plain
    assert check_range(above).passed == "pass"


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],
        lambda x: x.clone().requires_grad_(),
    ],
    ids=["channels last", "transposed", "with gaps", "with gradient"],
)
@pytest.mark.parametrize(
    "spelling",
    [
        "pgd(start=clean)",
        "fab(steps=5)",
        *(pytest.param(each, marks=pytest.mark.slow) for each in DETERMINISTIC if each != "pgd(start=clean)"),
        pytest.param("worst(pgd(start=clean), fab-t(steps=5))", marks=pytest.mark.slow),
    ],
)
def test_the_layout_in_memory_does_not_matter(spelling: str, layout: Callable[[Tensor], Tensor]):
    net, x, y = sample(4)
    net, x = net.double(), x.double()
    torch.testing.assert_close(attacked(spelling, net, layout(x), y), attacked(spelling, net, x, y))


@EVERY_SPELLING
def test_one_image_shown_as_many_without_a_copy(spelling: str):
    net, x, y = sample(1)
    many, labels = x.expand(3, -1, -1, -1), y.expand(3)
    assert torch.equal(attacked(spelling, net, many, labels), attacked(spelling, net, many.clone(), labels.clone()))


def test_functions_are_attacked_and_evaluated():
    net, x, y = sample()
    plain = attacked("pgd", net, x, y)
    for function in (lambda x: 1 * net(x), net.forward, functools.partial(net.forward)):
        assert torch.equal(attacked("pgd", function, x, y), plain)
        found = evaluate(function, (x, y), PGD(Linf(EPS)))
        assert found.accuracies() == evaluate(net, (x, y), PGD(Linf(EPS))).accuracies()
        assert found.warnings == ()


@pytest.mark.slow
def test_functions_are_diagnosed():
    net, x, y = sample()
    diagnosis = diagnose(net.forward, (x, y), Linf(EPS), n=2, surrogate=net.forward)
    assert diagnosis["eval mode"].passed == "pass"


def shifts(x: Tensor) -> Tensor:
    return x.sub_(0.5).mul_(2)


def shifts_behind_autograd(x: Tensor) -> Tensor:
    x.data.sub_(0.1)
    return x


@pytest.mark.parametrize(
    ("spelling", "before"),
    [
        (each, before) if each in SOME else pytest.param(each, before, marks=pytest.mark.slow)
        for each in SPELLINGS
        for before in (shifts, shifts_behind_autograd)
    ],
)
def test_a_network_may_work_in_place_on_its_images(spelling: str, before: Callable[[Tensor], Tensor]):
    net, x, y = sample()
    copying = Around(net, before=lambda x: before(x.clone()))
    expected = attacked(spelling, copying, x, y)
    given = x.clone()
    assert torch.equal(attacked(spelling, Around(net, before=before), given, y), expected)
    assert torch.equal(given, x)


def test_evaluation_and_training_leave_images_to_networks_that_work_in_place():
    net, x, y = sample()
    given = x.clone()
    evaluate(Around(net, before=shifts), (given, y), PGD(Linf(EPS)))
    objective = compose(TRADES(), student=Around(tiny(0), before=shifts))
    objective(given, objective.perturb(given, y, Linf(EPS)), y)
    assert torch.equal(given, x)


class InTrainMode(nn.Module):
    """As GoogLeNet does: a second output while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net = sharp()

    def forward(self, x: Tensor):
        logits = self.net(x)
        return (logits, logits) if self.training else logits


def test_other_outputs_than_logits():
    net, x, y = sample()
    assert fooled(net, attacked("pgd", InTrainMode().train(), x, y), y).any()
    with pytest.raises(UserError, match=r"must return logits, a tensor \(N, K\), not dict"):
        attacked("pgd", Around(net, after=lambda logits: {"logits": logits}), x, y)
    with pytest.raises(UserError, match="not tuple in train mode"):
        compose(TRADES(), student=InTrainMode()).train()(x, x, y)


@pytest.mark.filterwarnings("ignore:.*jit.trace:DeprecationWarning")
def test_torchscript_is_attacked_and_evaluated():
    net, x, y = sample()
    traced = torch.jit.trace(net, x)
    assert isinstance(traced, nn.Module)
    assert torch.equal(attacked("pgd", traced, x, y), attacked("pgd", net, x, y))
    assert evaluate(traced, (x, y), PGD(Linf(EPS))).accuracies() == evaluate(net, (x, y), PGD(Linf(EPS))).accuracies()


def test_a_longer_step_than_the_ball_is_wide_is_refused_in_training():
    _, x, y = sample()
    with pytest.raises(UserError, match=r"perturb: step_size=2 crosses the whole of Linf\(8/255\) .* write 2/255"):
        compose(TRADES(), student=tiny(0)).perturb(x, y, Linf(8 / 255), step_size=2)
