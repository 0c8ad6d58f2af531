"""The folded twin computes what the network computes in eval mode, whatever happens to the network."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.networks import sgd_step, with_random_norms
from torch import Tensor, nn

from advalign.models import MODELS, Folded, Normalized, Tapped, build, layers

FOLDED = {
    "small-cnn": 3,
    "resnet18": 20,
    "resnet34": 36,
    "preact-resnet18": 8,  # the second norm of each block; the first reads a sum
    "wide-resnet-28-10": 13,  # and the stem's
    "wide-resnet-34-10": 16,
    "wide-resnet": 13,
    "dm-wide-resnet": 13,
    "dm-preact-resnet18": 8,
    "vgg16": 13,
}


def built(name: str = "resnet18") -> nn.Module:
    return with_random_norms(build(f"{name}(width=2)", classes=5))


def images() -> Tensor:
    return torch.rand(2, 3, 32, 32, dtype=torch.float64)


def assert_same(folded: Folded, net: nn.Module) -> None:
    x = images().requires_grad_()
    assert not folded.training
    ours, plain = folded(x), copy.deepcopy(net).eval()(x)
    torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10)
    ours_grad, plain_grad = (torch.autograd.grad(out.logsumexp(1).sum(), x)[0] for out in (ours, plain))
    torch.testing.assert_close(ours_grad, plain_grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_network(name):
    net = built(name)
    state = copy.deepcopy(net.state_dict())
    folded = Folded(net)
    assert len(folded.pairs) == FOLDED[name]
    assert_same(folded, net)
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_follows_training_in_the_same_storage():
    net = built()
    folded = Folded(net)
    twin = folded.twin
    for _ in range(2):
        sgd_step(net, images())
        folded.refresh()
        assert_same(folded, net)
    assert folded.twin is twin


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.to(memory_format=torch.channels_last),
        lambda net: net.load_state_dict(built("resnet18").state_dict()),
        lambda net: [setattr(p, "data", p.data * 1.1) for p in net.parameters()],
        lambda net: setattr(net.get_submodule("layer2.0"), "bn1", nn.BatchNorm2d(4).double()),
        lambda net: net.float().double(),
    ],
    ids=["memory format", "load_state_dict", "data", "module", "type"],
)
def test_follows_whatever_replaces_weights(change):
    net = built()
    folded = Folded(net)
    sgd_step(net, images())
    change(net)
    folded.refresh()
    assert_same(folded, net)


def test_registers_nothing_and_shares_all_but_the_folded_convolutions():
    net = built()
    folded = Folded(net)
    assert not folded.state_dict()
    assert not list(folded.parameters())
    assert not any(parameter.requires_grad for parameter in folded.twin.parameters())
    shared = {tensor.data_ptr() for tensor in net.state_dict().values()}
    own = {name for name, tensor in folded.twin.state_dict().items() if tensor.data_ptr() not in shared}
    assert {name.rpartition(".")[2] for name in own} == {"weight", "bias"}
    assert len(own) == 2 * FOLDED["resnet18"]
    weights = [pair.folded.weight for pair in folded.pairs]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_the_input_reaches_no_parameter_in_the_graph():
    net = built()
    Folded(net)(images().requires_grad_()).sum().backward()
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_copy_follows_its_own_network():
    net = built()
    folded = Folded(net)
    copied, copied_folded = copy.deepcopy((net, folded))
    sgd_step(copied, images())
    copied_folded.refresh()
    assert_same(copied_folded, copied)
    assert_same(folded, net)


def test_a_tapped_network_keeps_its_features():
    net = built()
    tapped = Tapped(net, ("layer1.0.bn1", "layer2.0.conv1", *layers(net)))
    folded = Folded(tapped)
    assert len(folded.pairs) == FOLDED["resnet18"] - 2  # a tapped norm and a tapped convolution stay
    out, plain = folded(images_ := images()), tapped.eval()(images_)
    assert out.features.keys() == plain.features.keys()
    for layer, feature in plain.features.items():
        torch.testing.assert_close(out.features[layer], feature, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("tap", "pairs"), [("0", 0), ("0.0", 0), ("1", 0), ("2", 1)])
def test_a_tap_between_convolution_and_norm_keeps_them_apart(tap, pairs):
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert len(Folded(net).pairs) == 1
    assert len(Folded(Tapped(net, (tap,))).pairs) == pairs


def test_folds_behind_a_normalisation():
    net = Normalized(built(), [0.5] * 3, [0.25] * 3).double()
    folded = Folded(net)
    assert len(folded.pairs) == FOLDED["resnet18"]
    assert_same(folded, net)


class Branching(nn.Module):
    """Control flow on values, which cannot be traced."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        out = self.bn(self.conv(x))
        return (out if out.sum() > 0 else -out).mean((2, 3))


class Repeating(nn.Module):
    """Modules called twice, a convolution read twice, and one whose weight is used on the side."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.read, self.read_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.tied, self.tied_bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        x = self.bn(self.conv(self.bn(self.conv(x))))
        read = self.read(x)
        x = self.read_bn(read) + read
        x = self.tied_bn(self.tied(x))
        return nn.functional.conv2d(x, self.tied.weight).mean((2, 3))


class Foldable(nn.Module):
    """Groups, biases, a norm without weights, one under two names, and options of forward."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, bias=True, groups=3), nn.BatchNorm2d(6, affine=False)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.again = self.bn2
        self.conv3, self.batch = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

    def forward(self, x, mask=None, log=False):
        x = self.again(self.conv2(self.bn1(self.conv1(x)).relu()))
        if mask is not None:
            x = x * mask
        return (x.log() if log else self.batch(self.conv3(x)).relu()).mean((2, 3))


@pytest.mark.parametrize(("make", "pairs"), [(Branching, 0), (Repeating, 0), (Foldable, 2)])
def test_other_networks_fold_where_it_is_safe(make, pairs):
    net = with_random_norms(make())
    folded = Folded(net)
    assert len(folded.pairs) == pairs
    assert_same(folded, net)
