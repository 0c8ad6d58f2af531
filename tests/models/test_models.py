"""Every built-in network against the published sizes; names, spellings and their errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from advalign.errors import UserError
from advalign.models import MODELS, build, canonical, check_output, layers

NARROW = {name: f"{name}(width=4)" for name in MODELS}
PUBLISHED = {
    "resnet18": 11_173_962,  # kuangliu/pytorch-cifar
    "resnet34": 21_282_122,
    "preact-resnet18": 11_171_146 + 2 * 512,  # kuangliu's, and the BatchNorm that Rice et al. put before the pooling
    "wide-resnet-28-10": 36_479_194,  # Zagoruyko and Komodakis, table 4: 36.5M
    "wide-resnet-34-10": 46_160_474,  # the TRADES code without its unused sub_block1
    "wide-resnet": 36_479_194,
    "dm-wide-resnet": 36_479_194,
    "dm-preact-resnet18": 11_171_146 + 2 * 512 + 8 * (64 * 128 + 128 * 256 + 256 * 512),  # shortcuts of 3x3, not 1x1
    "vgg16": 14_728_266,
    "small-cnn": 94_762,
}


def on_meta(spelling: str, classes: int = 10) -> nn.Module:
    with torch.device("meta"):
        return build(spelling, classes=classes)


def size(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def is_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.BatchNorm2d)


@pytest.mark.parametrize("name", MODELS)
def test_has_the_published_number_of_parameters(name):
    assert size(on_meta(name)) == PUBLISHED[name]


def test_preact_resnet18_by_hand():
    stem, fc, bn = 9 * 3 * 64, 512 * 10 + 10, 2 * 512
    first = 4 * (9 * 64 * 64) + 4 * 2 * 64
    later = [(9 + 1) * c * 2 * c + 3 * 9 * (2 * c) ** 2 + 2 * c + 3 * 2 * 2 * c for c in (64, 128, 256)]
    assert size(on_meta("preact-resnet18")) == stem + first + sum(later) + bn + fc


@pytest.mark.parametrize(("width", "gflop"), [(64, 1.1108), (32, 0.2786), (16, 0.0701)])
def test_resnet18_costs_the_flops_of_our_performance_notes(width, gflop):
    net = on_meta(f"resnet18(width={width})").eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, 32, 32, device="meta"))
    assert round(counter.get_total_flops() / 1e9, 4) == gflop


@pytest.mark.parametrize("name", MODELS)
def test_width_is_the_channels_of_the_first_stage(name):
    for width in (4, 8):
        norms = [m for m in on_meta(f"{name}(width={width})").get_submodule("layer1").modules() if is_norm(m)]
        assert norms[-1].num_features == width


@pytest.mark.parametrize("name", MODELS)
def test_classifies_small_colour_images(name):
    check_output(build(NARROW[name], classes=7), (3, 32, 32), classes=7)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "vgg16"])
def test_classifies_digits(name):
    check_output(build(NARROW[name], classes=10, channels=1), (1, 8, 8), classes=10)


def test_vgg16_says_that_digits_are_too_small():
    with pytest.raises(UserError, match=r"fails on an image of shape \(1, 8, 8\): RuntimeError"):
        check_output(build(NARROW["vgg16"], classes=10, channels=1), (1, 8, 8), classes=10)


@pytest.mark.parametrize("name", MODELS)
def test_works_on_nothing_in_place_and_names_its_stages(name):
    net = on_meta(NARROW[name])
    assert not any(getattr(module, "inplace", False) for module in net.modules())
    stages = [f"layer{i}" for i in range(1, 6) if hasattr(net, f"layer{i}")]
    assert layers(net) == (*stages, "penultimate", "logits")


def test_the_wide_network_starts_as_in_the_trades_code():
    net = build("wide-resnet-28-10(width=64)", classes=10)
    conv, fc = net.get_submodule("layer3.1.conv1"), net.get_submodule("fc")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(fc, nn.Linear)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.01)
    assert not fc.bias.any()


def test_small_cnn_learns_to_tell_stripes():
    torch.manual_seed(0)
    net = build("small-cnn(width=8)", classes=2, channels=1)
    stripes = torch.tensor([0.0, 1.0]).repeat(4).expand(8, 8)
    y = torch.arange(64) % 2
    x = torch.where(y.view(-1, 1, 1, 1) == 0, stripes, stripes.T) + 0.3 * torch.randn(64, 1, 8, 8)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (net.eval()(x).argmax(1) == y).all()


@pytest.mark.parametrize(
    ("spelling", "expected"),
    [
        ("resnet18", "resnet18"),
        ("resnet18(width=64)", "resnet18"),
        (" resnet18( width = 16 ) ", "resnet18(width=16)"),
        ("wide-resnet-34-10(width=16)", "wide-resnet-34-10(width=16)"),
        ("resnet18(strides=(1,1,2,2))", "resnet18(strides=(1, 1, 2, 2))"),
        ("resnet18(strides=(1, 2, 2, 2))", "resnet18"),
        ("small-cnn(width=32)", "small-cnn"),
    ],
)
def test_canonical(spelling, expected):
    assert canonical(spelling) == canonical(expected) == expected


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        (
            "resnet81",
            "unknown model 'resnet81': did you mean 'resnet18'? choose from dm-preact-resnet18, ",
        ),
        (
            "resnet18(widht=16)",
            "unknown argument of model 'resnet18' 'widht': did you mean 'width'? choose from strides, width",
        ),
        ("resnet18(classes=10)", "unknown argument of model 'resnet18' 'classes': "),
        ("resnet18(width=0)", "width=0 must be at least 1"),
        ("resnet18(width=x)", "model 'resnet18': width='x' must be a whole number"),
        ('vgg16(width="x")', "model 'vgg16': width='x' must be a whole number"),
        ("resnet18(16)", "cannot read 'resnet18(16)': "),
        ("resnet18+vgg16", "one name was expected, not 2"),
        ("", "cannot read ''"),
    ],
)
def test_a_wrong_spelling_is_one_clear_line(spelling, message):
    with pytest.raises(UserError) as raised:
        build(spelling, classes=10)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("classes", "channels", "message"), [(1, 3, "classes=1"), (10, 0, "channels=0")])
def test_refuses_sizes_that_make_no_classifier(name, classes, channels, message):
    with pytest.raises(UserError, match=f"{message} must be at least"):
        build(name, classes=classes, channels=channels)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_computes_in_float32_under_autocast(name):
    torch.manual_seed(0)
    net = build(f"{name}(width=4)", classes=5).eval()
    read: list[torch.Tensor] = []
    net.get_submodule("fc").register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits = net(torch.rand(3, 3, 32, 32))
    features = read[0].double()
    head = net.get_submodule("fc").double()
    assert isinstance(head, nn.Linear)
    expected = features @ head.weight.T + head.bias
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-6)  # bf16 would be off by 1e-3
    net.double()
    assert net(torch.rand(1, 3, 32, 32).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("spelling", "sides"),
    [("resnet18(width=2, strides=(1, 1, 2, 2))", [32, 32, 16, 8]), ("resnet18(width=2)", [32, 16, 8, 4])],
)
def test_the_strides_of_the_stages_say_how_large_the_maps_are(spelling: str, sides: list[int]):
    net, seen = build(spelling, classes=10), []
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        net.get_submodule(stage).register_forward_hook(lambda _net, _x, out: seen.append(out.shape[2:]))
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    assert seen == [(side, side) for side in sides]
