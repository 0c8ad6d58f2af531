"""Checkpoints from elsewhere: found in any nesting, behind any prefix; where they misfit, the likely cause is named.

The truth is the network that was saved: what is loaded has its weights to the bit, and so its outputs.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.networks import TinyNet, tiny
from torch import Tensor, nn
from torch.nn.utils import prune

import advalign as aa
from advalign import models
from advalign.errors import UserError
from advalign.runs import find_weights
from advalign.runs.checkpoint import load_into, load_weights

State = dict[str, Tensor]


def saved() -> TinyNet:
    return tiny(1).eval()


def fresh() -> TinyNet:
    return tiny(2).eval()


def assert_loaded(net: nn.Module, truth: nn.Module) -> None:
    x = torch.rand(2, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(net(x), truth(x))


def put_before(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def momentum_of(net: nn.Module) -> dict[str, Any]:
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.rand(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


NESTINGS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "ordered": OrderedDict,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "acc": 0.9},
    "model_state_dict": lambda s: {"model_state_dict": s},
    "net": lambda s: {"net": put_before("module.", s), "acc": 93.1, "epoch": 199},
    "a name of one's own": lambda s: {"my_best_weights_so_far": s},
    "deep": lambda s: {"checkpoint": {"models": {"student": {"weights": s}}}, "rng": torch.zeros(5, dtype=torch.uint8)},
    "list": lambda s: [{"epoch": 1}, s],
    "tuple in a mapping": lambda s: {"models": (s,)},
    "optimizer beside": lambda s: {"state": s, "optimizer": momentum_of(fresh())},
    "numbers beside": lambda s: {**s, "epoch": 3, "name": "net", "args": {"lr": 0.1}},
    "module": lambda s: put_before("module.", s),
    "compiled": lambda s: put_before("_orig_mod.", s),
    "compiled and parallel": lambda s: {"state_dict": put_before("module._orig_mod.", s)},
    "model.": lambda s: {"state_dict": put_before("model.", s), "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
    "deep prefix": lambda s: put_before("module.model.backbone.", s),
    "metrics beside": lambda s: {
        "state_dict": {**put_before("model.", s), "accuracy.correct": torch.tensor(3), "loss.weight": torch.rand(4)}
    },
    "averaged": lambda s: {"n_averaged": torch.tensor(7), **put_before("module.", s)},
    "equal average beside": lambda s: {"model": s, "ema": {name: value.clone() for name, value in s.items()}},
    "no counters": lambda s: {name: value for name, value in s.items() if "num_batches" not in name},
    "counters of another shape": lambda s: {
        name: value.expand(3) if "num_batches" in name else value for name, value in s.items()
    },
    "half": lambda s: {name: value.double() if value.is_floating_point() else value for name, value in s.items()},
    "parameters": lambda s: {"params": {name: nn.Parameter(v, v.is_floating_point()) for name, v in s.items()}},
}


@pytest.mark.parametrize("name", NESTINGS)
@pytest.mark.parametrize("ending", [".pt", ".pth", ".ckpt", ".bin"])
def test_the_state_dict_is_found_in_any_nesting(name: str, ending: str, tmp_path: Path):
    net, truth = fresh(), saved()
    file = tmp_path / f"weights{ending}"
    torch.save(NESTINGS[name](truth.state_dict()), file, _use_new_zipfile_serialization=ending != ".pth")
    stored, card = load_weights(file)
    note = load_into(net, stored, str(file))
    assert card == {}
    assert_loaded(net, truth)
    assert (note == "") == (
        name in ("plain", "ordered", "numbers beside", "no counters", "counters of another shape", "half")
    )


def test_what_was_taken_is_said_in_a_line():
    state = {"state_dict": {**put_before("model.", saved().state_dict()), "loss.weight": torch.rand(4)}}
    note = load_into(fresh(), state, "file")
    assert note == "taken from 'state_dict'; prefix 'model.' taken off; 1 other tensors left out, such as 'loss.weight'"


def test_safetensors_of_others_are_read_whatever_they_are_called(tmp_path: Path):
    for ending in ("safetensors", "bin"):
        net, truth = fresh(), saved()
        save_file(put_before("model.", truth.state_dict()), tmp_path / f"a.{ending}")
        load_into(net, load_weights(tmp_path / f"a.{ending}")[0], "file")
        assert_loaded(net, truth)


def test_a_pickle_that_contains_itself_is_read():
    stored: dict[str, Any] = {"net": saved().state_dict()}
    stored["itself"] = stored
    stored["list"] = [stored, [stored]]
    net = fresh()
    load_into(net, stored, "file")
    assert_loaded(net, saved())


def test_of_two_that_differ_the_user_names_one(tmp_path: Path):
    first, second = saved(), tiny(3).eval()
    file = tmp_path / "a#b.pt"
    both = {**put_before("student.", first.state_dict()), **put_before("teacher.", second.state_dict())}
    for content, names in [
        ({"model": first.state_dict(), "ema": second.state_dict()}, ("model", "ema")),
        ({"state_dict": both}, ("state_dict/student", "state_dict/teacher")),
        ({**first.state_dict(), "average": second.state_dict()}, (".", "average")),
    ]:
        torch.save(content, file)
        with pytest.raises(UserError, match=rf"holds 2 state dicts that fit and differ, '{names[0]}', '{names[1]}': "):
            load_into(fresh(), load_weights(file)[0], str(file))
        for name, truth in zip(names, (first, second), strict=True):
            weights = find_weights(f"{file}#{name}")
            assert (weights.path, weights.part) == (file, name)
            net = fresh()
            weights.load_into(net, weights.read()[0])
            assert_loaded(net, truth)
        with pytest.raises(UserError, match=r"unknown state dict of .* 'averag': .*choose from"):
            find_weights(f"{file}#averag").load_into(fresh(), load_weights(file)[0])


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.normalize = models.Normalized(nn.Identity(), [0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.normalize(x))


def test_a_network_in_a_wrapper_takes_the_weights_of_the_one_inside():
    for wrap in (lambda net: models.Normalized(net, [0.5, 0.4, 0.3], [0.2, 0.2, 0.1]), Wrapped):
        for prefix in ("", "module."):
            net = wrap(fresh())
            note = load_into(net, put_before(prefix, saved().state_dict()), "file")
            assert "prefix 'net.' put before" in note
            assert_loaded(net, wrap(saved()))


class Twice(nn.Module):
    """A network under two names, and a part of it under a third."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.again, self.part = net, net, next(net.children())

    def forward(self, x: Tensor) -> Tensor:
        return self.again(x)


@pytest.mark.parametrize("file_of", [Twice, lambda net: net])
def test_a_network_under_two_names_takes_its_own_weights_and_those_of_the_one_inside(
    file_of: Callable[[nn.Module], nn.Module],
):
    net = Twice(fresh())
    load_into(net, file_of(saved()).state_dict(), "file")
    assert_loaded(net, Twice(saved()))


def test_a_normalisation_in_the_file_is_never_dropped_in_silence():
    state = Wrapped(saved()).state_dict()
    for content in (state, {"mu": torch.rand(3), "sigma": torch.rand(3), **saved().state_dict()}):
        with pytest.raises(UserError, match=r"normalises its images, and the model does not: .*--mean and --std"):
            load_into(fresh(), content, "file")
        net = fresh()
        load_into(net, content, "file", normalized=True)
        assert_loaded(net, saved())
    net = Wrapped(fresh())
    assert load_into(net, state, "file") == ""
    assert_loaded(net, Wrapped(saved()))


def kuangliu(name: str) -> str:
    """The name in the authors' CIFAR ResNets, whose head is called `linear`."""
    return name.replace("fc.", "linear.")


def rice(name: str) -> str:
    """The name in Rice et al.'s PreActResNet-18."""
    return kuangliu(name).replace("shortcut.", "shortcut.0.")


def trades(name: str) -> str:
    """The name in the TRADES code's wide networks."""
    for stage in "123":
        name = name.replace(f"layer{stage}.", f"block{stage}.layer.")
    name = name.replace("shortcut.", "convShortcut.")
    return f"bn1.{name[3:]}" if name.startswith("bn.") else name


AUTHORS = {
    "resnet18(width=4)": kuangliu,
    "preact-resnet18(width=4)": rice,
    "wide-resnet-28-10(width=4)": trades,
}


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("model", AUTHORS)
def test_the_authors_checkpoints_fit_under_their_own_names(model: str, prefix: str):
    torch.manual_seed(0)
    truth, net = (models.build(model, classes=4).eval() for _ in range(2))
    state = {prefix + AUTHORS[model](name): value for name, value in truth.state_dict().items()}
    if model.startswith("wide"):
        idle = {name.replace("block1", "sub_block1"): v + 1 for name, v in state.items() if "block1" in name}
        state |= idle
    assert "fit in their order" in load_into(net, {"state_dict": state}, "file")
    assert_loaded(net, truth)


@pytest.mark.parametrize("width", [3, 4])
def test_a_match_by_order_alone_is_said_and_whether_it_could_be_another(width: int):
    ours = nn.Sequential(OrderedDict(a=nn.Linear(3, width), b=nn.Linear(width, 3)))
    theirs = nn.Sequential(OrderedDict(x=nn.Linear(3, width), y=nn.Linear(width, 3)))
    doubt = ", and layers of equal shape could be exchanged: look at the clean accuracy"
    assert load_into(ours, theirs.state_dict(), "file") == (
        "4 tensors have other names there and fit in their order, such as 'x.weight' for 'a.weight'"
        + (doubt if width == 3 else "")
    )
    assert load_into(ours, ours.state_dict(), "file") == ""


def test_names_that_contradict_the_order_are_refused():
    two = nn.Sequential(OrderedDict(a=nn.Linear(3, 3), b=nn.Linear(3, 3)))
    state = two.state_dict()
    swapped = {name: state[name] for name in ("b.weight", "b.bias", "a.weight", "a.bias")}
    load_into(two, swapped, "file")  # by name
    renamed = {name.replace("a.", "c."): value for name, value in swapped.items()}
    with pytest.raises(UserError, match=r"has no 'a.weight'"):
        load_into(two, renamed, "file")


def changed(model: str, **sizes: int) -> State:
    return models.build(model, **{"classes": 4, **sizes}).state_dict()


LARGE = dict(changed("resnet18(width=4)"), **{"conv1.weight": torch.zeros(4, 3, 7, 7)})

MISFITS: dict[str, tuple[Any, str]] = {
    "classes": (
        changed("resnet18(width=4)", classes=10),
        r"'fc.weight' is \(10, 32\), not \(4, 32\): .* 10 classes, not 4",
    ),
    "width": (changed("resnet18(width=8)"), r"'conv1.weight' is \(8, 3, 3, 3\), not .*: a network of another width"),
    "channels": (changed("resnet18(width=4)", channels=1), "a network for images of 1 channels, not 3"),
    "torchvision": (LARGE, "its first layer is 7x7, not 3x3, as in networks for larger images"),
    "deeper": (changed("resnet34(width=4)"), "has no 'layer1.2.conv1.weight': a deeper network"),
    "another": (changed("vgg16(width=4)"), "does not fit the model: "),
    "no statistics": (
        {name: v for name, v in changed("resnet18(width=4)").items() if "running" not in name},
        "has no 'bn1.running_mean': parameters without the statistics",
    ),
    "nothing alike": (
        {"tok.weight": torch.zeros(3)},
        "has no 'conv1.weight', but 'tok.weight': .*another architecture",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_misfit_is_named_with_its_likely_cause(name: str):
    net = models.build("resnet18(width=4)", classes=4)
    before = copy.deepcopy(net.state_dict())
    content, words = MISFITS[name]
    with pytest.raises(UserError, match=words) as error:
        load_into(net, {"state_dict": content}, "file")
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize(
    "norm",
    [
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.spectral_norm,
        nn.utils.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore::FutureWarning")),
        lambda module: prune.random_unstructured(module, "weight", 1),
    ],
)
def test_a_weight_that_is_made_of_others_in_the_file_is_named(norm: Callable[[nn.Module], nn.Module]):
    theirs, ours = fresh(), fresh()
    norm(next(module for module in theirs.modules() if isinstance(module, nn.Linear)))
    with pytest.raises(UserError, match=r"it has no '.*weight': there it is made of others, as by weight or spectral"):
        load_into(ours, put_before("module.", theirs.state_dict()), "file")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value * float("nan"), "has values in 'conv.weight' that are not a number, as after a training"),
        (lambda value: value.to(torch.int8), r"has 'conv.weight' in torch.int8, as quantised networks do: floats are"),
    ],
)
def test_weights_of_the_right_shapes_that_are_none_are_refused(change: Callable[[Tensor], Tensor], words: str):
    net = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    state = net.state_dict()
    with pytest.raises(UserError, match=words):
        load_into(net, {**state, "conv.weight": change(state["conv.weight"])}, "file")
    load_into(net, {**state, "norm.running_mean": state["norm.running_mean"] - torch.inf}, "file")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
            r"holds no tensors: .* Git LFS, .* lfs pull",
        ),
        (b"\n<!DOCTYPE html><html>404", "holds no tensors: it is a web page, as after a download that failed"),
        (b"", "is empty$"),
    ],
)
def test_files_that_are_something_else_are_named(content: bytes, words: str, tmp_path: Path):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        load_weights(tmp_path / "net.pt")


def test_what_fits_no_number_of_classes_is_compared_at_its_own(tmp_path: Path):
    torch.save(changed("resnet34(width=4)"), tmp_path / "deep.pt")
    with pytest.raises(UserError, match=r"which has no 'layer1.2.* a deeper network, or another architecture"):
        aa.load(tmp_path / "deep.pt", model="resnet18(width=4)")


def test_a_file_without_tensors_is_none(tmp_path: Path):
    torch.save({"epoch": 3, "optimizer": [1, 2]}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="is not a state dict"):
        load_weights(tmp_path / "a.pt")


@pytest.mark.parametrize("place", ["plain", "runs@home", "a b", "1@2@3", "net(1)@x", "#1"])
def test_models_before_paths_with_any_sign_in_them(place: str, tmp_path: Path):
    folder = tmp_path / place
    folder.mkdir()
    net = models.build("small-cnn(width=2)", classes=4)
    file = folder / "w@1.pt"
    torch.save(net.state_dict(), file)
    for model in ("small-cnn(width=2)", "small-cnn( width = 2 )"):
        weights = find_weights(f"{model}@{file}")
        assert (weights.path, weights.model) == (file, "small-cnn(width=2)")
    assert find_weights(file).model is None
    with pytest.raises(UserError, match="no run folder or weights file"):
        find_weights(f"{file}x")


@pytest.mark.parametrize("model", ["resnet18", "small-cnn(width=2)", "my.nets:make", 'my_nets:make(act="relu")'])
def test_a_network_without_weights_is_no_path(model: str):
    with pytest.raises(UserError) as raised:
        find_weights(model)
    assert str(raised.value).endswith(f": it is a network, whose weights are named as in {model}@FILE")


def test_weights_from_elsewhere_are_loaded_in_python_by_their_model_alone(tmp_path: Path):
    for classes, channels in ((7, 3), (4, 1)):
        net = models.build("resnet18(width=4)", classes=classes, channels=channels).eval()
        state = {kuangliu(name): value for name, value in net.state_dict().items()}
        torch.save({"net": put_before("module.", state)}, tmp_path / "a.pt")
        x = torch.rand(2, channels, 8, 8)
        assert torch.equal(aa.load(f"resnet18(width=4)@{tmp_path / 'a.pt'}")(x), net(x))
    with pytest.raises(UserError, match="does not say which architecture"):
        aa.load(tmp_path / "a.pt")
