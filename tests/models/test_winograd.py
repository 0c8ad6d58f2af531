"""The convolution in fewer multiplications is the convolution, and the plain one wherever it would not pay."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.networks import sgd_step, with_random_norms
from torch import Tensor, nn

from advalign.models import Folded, Tapped, build
from advalign.models.winograd import FEWEST, MOST, Winograd
from advalign.objectives import compose, parse
from advalign.threats import Linf

LARGER = [(8, 8), (4, 16), (16, 4), (12, 12)]


def adopted(dtype: torch.dtype = torch.float64, bias: bool = True) -> tuple[Winograd, nn.Conv2d]:
    """Return a convolution, frozen as in a twin, and its plain original."""
    torch.manual_seed(0)
    plain = nn.Conv2d(256, 260, 3, padding=1, bias=bias).to(dtype).requires_grad_(False)
    conv = Winograd.adopt(copy.deepcopy(plain))
    assert conv is not None
    return conv, plain


def maps(n: int, h: int, w: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 256, h, w, dtype=dtype)


def both(conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output, and the gradient of a random sum of it to the input."""
    x = x.detach().requires_grad_()
    out = conv(x)
    torch.manual_seed(1)
    return out, torch.autograd.grad((out * torch.randn(out.shape, dtype=torch.float64).to(out.dtype)).sum(), x)[0]


@pytest.mark.parametrize("bias", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("h", "w"), [(4, 8), *(pytest.param(*size, marks=pytest.mark.slow) for size in ((4, 4), (8, 4), *LARGER))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_the_plain_convolution_forth_and_back(h: int, w: int, bias: bool, layout: torch.memory_format):
    conv, plain = adopted(bias=bias)
    x = maps(FEWEST, h, w).to(memory_format=layout)
    for ours, theirs in zip(both(conv, x), both(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert conv.transformed is not None


def test_has_the_plain_second_derivative():
    conv, plain = adopted()

    def curvature(conv: nn.Module) -> Tensor:
        x = maps(FEWEST, 4, 4).requires_grad_()
        (grad,) = torch.autograd.grad(conv(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    torch.manual_seed(2)
    ours = curvature(conv)
    torch.manual_seed(2)
    torch.testing.assert_close(ours, curvature(plain), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_equals_it_in_pieces():
    conv, plain = adopted()
    x = maps(MOST // 4 + 3, 8, 8)
    for ours, theirs in zip(both(conv, x), both(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_float32_is_as_exact_as_an_attack_needs():
    conv, plain = adopted(torch.float32)
    for size in (4, 8):
        x = maps(FEWEST, size, size, torch.float32)
        exact = both(copy.deepcopy(plain).double(), x.double())
        for ours, theirs in zip(both(conv, x), exact, strict=True):
            assert (ours - theirs).norm() < 1e-5 * theirs.norm()


@pytest.mark.parametrize(("n", "h", "w"), [(FEWEST - 1, 4, 4), (3, 8, 8), (FEWEST, 5, 4), (FEWEST, 2, 2), (2, 20, 20)])
def test_is_the_plain_one_where_it_would_not_pay(n: int, h: int, w: int):
    conv, plain = adopted()
    x = maps(n, h, w)
    assert torch.equal(conv(x), plain(x))
    assert conv.transformed is None


def test_is_the_plain_one_under_autocast():
    conv, plain = adopted(torch.float32)
    x = maps(FEWEST, 4, 4, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(both(conv, x), both(plain, x), strict=True):
            assert torch.equal(ours, theirs)


def test_the_gradient_has_the_precision_of_the_output_under_autocast_too():
    conv, _ = adopted(torch.float32)
    x = maps(FEWEST, 4, 4, torch.float32).requires_grad_()
    out = conv(x)
    (plainly,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], plainly)


def test_takes_a_single_image_without_a_batch():
    conv, plain = adopted()
    x = maps(FEWEST, 16, 16)[0]
    assert torch.equal(conv(x), plain(x))


class Own(nn.Conv2d):
    """Somebody's own convolution."""


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 5, padding=2),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 3, stride=2, padding=1),
        nn.Conv2d(256, 256, 3, padding=2, dilation=2),
        nn.Conv2d(512, 256, 3, padding=1, groups=2),
        nn.Conv2d(256, 256, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(256, 256, 3, padding="same"),
        nn.Conv2d(256, 255, 3, padding=1),
        nn.Conv2d(255, 256, 3, padding=1),
        Own(256, 256, 3, padding=1),
        nn.Conv2d(256, 256, 3, padding=1).half(),
        nn.Conv2d(256, 256, 3, padding=1, device="meta"),
    ],
)
def test_leaves_other_convolutions_alone(conv: nn.Conv2d):
    kind = type(conv)
    assert Winograd.adopt(conv.requires_grad_(False)) is None
    assert type(conv) is kind


def test_leaves_convolutions_alone_whose_weights_may_move():
    trained, hooked = nn.Conv2d(256, 256, 3, padding=1), nn.Conv2d(256, 256, 3, padding=1).requires_grad_(False)
    hooked.register_forward_pre_hook(lambda conv, args: None)
    assert Winograd.adopt(trained) is None
    assert Winograd.adopt(hooked) is None


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("resnet18", 3), ("preact-resnet18", 3)])
def test_a_twin_follows_its_network(name: str, count: int):
    net = with_random_norms(build(f"{name}(width=32)", classes=5))
    folded = Folded(Tapped(net, ("layer4", "layer4.1.conv2")))
    assert len(folded.fast) == count
    x = torch.rand(FEWEST, 3, 32, 32, dtype=torch.float64)
    for _ in range(2):
        out, plain = folded(x), Tapped(copy.deepcopy(net), ("layer4", "layer4.1.conv2")).eval()(x)
        assert all(conv.transformed is not None for conv in folded.fast)
        torch.testing.assert_close(out.logits, plain.logits, rtol=1e-10, atol=1e-10)
        for layer, feature in plain.features.items():
            torch.testing.assert_close(out.features[layer], feature, rtol=1e-10, atol=1e-10)
        sgd_step(net, torch.rand(2, 3, 32, 32, dtype=torch.float64))
        folded.refresh()
    assert all(type(module) is not Winograd for module in net.modules())


@pytest.mark.slow
def test_an_attack_in_training_leaves_no_transformed_weights(monkeypatch: pytest.MonkeyPatch):
    made: list[Winograd] = []
    transform = Winograd._transform
    monkeypatch.setattr(Winograd, "_transform", lambda conv: made.append(conv) or transform(conv))
    student, robust = (build("resnet18(width=32)", classes=5) for _ in range(2))
    objective = compose(parse("adaad"), student=student, robust=robust)  # whose attack runs the teacher too
    x, y = torch.rand(FEWEST, 3, 32, 32), torch.arange(FEWEST) % 5
    for _ in range(2):
        objective.perturb(x, y, Linf(8 / 255), steps=1)
    assert len(set(made)) == 6
    assert len(made) == 12
    assert all(conv.transformed is None for conv in made)
