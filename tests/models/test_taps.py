"""Tapped networks: the named layers' outputs, independent copies, frozen ones, other people's networks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from advalign.errors import UserError
from advalign.models import MODELS, Normalized, Tapped, build, last_stage, layers


def small(classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return build("small-cnn(width=4)", classes=classes)


class Overwriting(nn.Module):
    """An in-place ReLU after `bn`, a layer that gives a tuple, and one that never runs."""

    def __init__(self):
        super().__init__()
        self.bn, self.relu, self.unused = nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Identity()
        self.both, self.blocks = Both(), nn.ModuleList([nn.Identity()])
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.both(self.relu(self.bn(x)))[0])


class Both(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize("name", MODELS)
def test_gives_each_stage_of_a_built_in_network(name):
    net = build(f"{name}(width=2)", classes=10).eval()
    x = torch.rand(2, 3, 32, 32)
    out = Tapped(net, layers(net))(x)
    assert tuple(out.features) == layers(net)
    assert torch.equal(out.logits, net(x))
    assert out.features["logits"] is out.logits
    last = out.features[last_stage(net)]
    assert last.shape[:2] == (2, 2 * {3: 4, 4: 8, 5: 8}[len(layers(net)) - 2])
    if "preact" not in name and "wide" not in name:
        assert (last >= 0).all()
        head = net.get_submodule("fc")
        torch.testing.assert_close(head(last.mean((2, 3))), out.logits)


def test_gradients_flow_through_features():
    net = Tapped(small(), ("layer1",))
    net(torch.rand(2, 3, 8, 8)).features["layer1"].sum().backward()
    grads = {name.split(".")[1] for name, p in net.named_parameters() if p.grad is not None}
    assert grads == {"layer1"}


def test_logits_are_float32_under_bfloat16_autocast_and_keep_float64():
    somebodys = nn.Sequential(nn.Flatten(), nn.Linear(192, 5))
    net = Tapped(somebodys, ("logits",))
    with torch.autocast("cpu", torch.bfloat16):
        assert somebodys(torch.rand(2, 3, 8, 8)).dtype == torch.bfloat16
        assert net(torch.rand(2, 3, 8, 8)).features["logits"].dtype == torch.float32
    assert net.double()(torch.rand(2, 3, 8, 8).double()).logits.dtype == torch.float64


def test_a_copy_is_independent():
    tapped = Tapped(small(), ("layer2",))
    x = torch.rand(2, 3, 8, 8)
    tapped(x)
    tapped.net(x)  # a pass by another way must leave nothing that deepcopy cannot copy
    twin = copy.deepcopy(tapped)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    ours, theirs = tapped(x).features["layer2"], twin(x).features["layer2"]
    assert ours.any()
    assert not theirs.any()


def test_two_taps_on_one_network_do_not_meet():
    net = small()
    one, two = Tapped(net, ("layer1",)), Tapped(net, ("layer2", "logits"))
    x = torch.rand(1, 3, 8, 8)
    assert tuple(one(x).features) == ("layer1",)
    assert tuple(two(x).features) == ("layer2", "logits")


def test_a_frozen_network_stays_as_it_is():
    net = small()
    before = copy.deepcopy(net.state_dict())
    parent = nn.Sequential(Tapped(net, ("layer3",), frozen=True)).train()
    out = parent(torch.rand(4, 3, 8, 8, requires_grad=True))
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in parent.parameters())
    assert not out.logits.requires_grad
    assert not out.features["layer3"].requires_grad
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_one_that_learns_follows_its_mode_and_keeps_its_flags():
    net = small()
    net.get_submodule("layer1").requires_grad_(False)
    flags = [p.requires_grad for p in net.parameters()]
    tapped = Tapped(net, ()).eval().train()
    assert all(module.training for module in tapped.modules())
    assert [p.requires_grad for p in net.parameters()] == flags


def test_names_are_the_same_behind_a_normalisation():
    net = small().eval()
    wrapped = Normalized(net, [0.5] * 3, [0.2] * 3)
    x = torch.rand(2, 3, 8, 8)
    assert layers(wrapped) == layers(net)
    assert last_stage(wrapped) == "layer3"
    plain = Tapped(net, ("layer3",))((x - wrapped.mean) / wrapped.std)
    assert torch.equal(Tapped(wrapped, ("layer3",))(x).features["layer3"], plain.features["layer3"])


def test_other_networks_layers_are_their_children_and_the_children_of_sequences():
    net = Overwriting()
    expected = ("bn", "relu", "unused", "both", "blocks.0", "head", "head.0", "head.1", "penultimate", "logits")
    assert layers(net) == expected
    with pytest.raises(
        UserError, match=r"name the layer of Overwriting to align, as in layer=NAME: choose from bn, relu"
    ):
        last_stage(net)


def test_a_tap_sees_what_an_in_place_layer_overwrites():
    net = Overwriting().eval()
    x = torch.rand(2, 3, 4, 4) - 0.5
    torch.testing.assert_close(Tapped(net, ("bn",))(x).features["bn"], x, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("both", "layer 'both' gives tuple, not a tensor"),
        ("unused", "layer 'unused' does not run in the forward pass: choose from bn, logits"),
    ],
)
def test_a_layer_without_a_tensor_is_an_error_and_leaves_nothing(layer, message):
    tapped = Tapped(Overwriting(), ("bn", layer))
    with pytest.raises(UserError, match=message):
        tapped(torch.rand(2, 3, 4, 4))
    copy.deepcopy(tapped)


@pytest.mark.parametrize("layer", ["layer9", "", "net"])
def test_an_unknown_layer_is_an_error_with_the_alignable_ones(layer):
    with pytest.raises(
        UserError, match=f"unknown layer '{layer}'.*choose from layer1, layer2, layer3, logits, penultimate"
    ):
        Tapped(small(), (layer,))


def test_inner_modules_are_layers_too():
    out = Tapped(build("resnet18(width=2)", classes=3), ("layer4.0.bn1",))(torch.rand(2, 3, 8, 8))
    assert out.features["layer4.0.bn1"].min() < 0
