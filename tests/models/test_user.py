"""A user's own network by `module:function`, and the look at its logits."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import nn

from advalign.errors import UserError
from advalign.models import build, canonical, check_output

SOURCE = """
from torch import nn

class Wide(nn.Module):
    def __init__(self, classes: int, hidden: int = 8):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.LazyLinear(hidden), nn.Linear(hidden, classes))
    def forward(self, x):
        return self.body(x)

def make_net(classes: int, channels: int, drop: float = 0.0, act="relu"):
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.Dropout(drop), nn.Flatten(), nn.LazyLinear(classes))

def fixed():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 100))

def anything(**given):
    return nn.Linear(given["classes"], given["channels"])

def number(classes):
    return classes

class Theirs(nn.Linear):
    def __init__(self, depth=1, num_classes=1000):
        super().__init__(depth, num_classes)

def as_torchvision(*, weights=None, progress=True, **kwargs):
    return Theirs(**kwargs)

def as_timm(name, in_chans=3, num_classes=1000):
    return nn.Linear(in_chans, num_classes)

def failing(classes):
    raise RuntimeError("no weights here\\nsecond line")
"""


@pytest.fixture(autouse=True)
def nets(tmp_path, monkeypatch):
    (tmp_path / "own_nets.py").write_text(SOURCE)
    (tmp_path / "own_broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    importlib.invalidate_caches()
    yield
    for name in ("own_nets", "own_broken"):
        sys.modules.pop(name, None)


def test_builds_from_a_function_or_a_class_in_the_current_directory():
    net = build("own_nets:make_net(drop=1/4)", classes=10, channels=1)
    assert net.get_submodule("1").extra_repr().startswith("p=0.25")
    assert net(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert build("own_nets:Wide(hidden=5)", classes=3)(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_gives_a_function_only_what_it_takes():
    assert isinstance(build("own_nets:fixed", classes=10), nn.Sequential)
    net = build("own_nets:anything", classes=10, channels=1)
    assert repr(net) == "Linear(in_features=10, out_features=1, bias=True)"


def test_sizes_have_the_names_of_other_libraries_too():
    sizes = {"classes": 10, "channels": 1}
    assert repr(build('own_nets:as_timm(name="x")', **sizes)).startswith("Linear(in_features=1, out_features=10")
    assert repr(build("own_nets:Theirs", **sizes)).startswith("Theirs(in_features=1, out_features=10")
    assert repr(build("own_nets:as_torchvision(depth=2)", **sizes)).startswith("Theirs(in_features=2, out_features=10")
    assert (
        canonical("own_nets:as_torchvision( num_classes=7, depth = 2 )")
        == "own_nets:as_torchvision(depth=2, num_classes=7)"
    )
    spelled = build("own_nets:as_torchvision(num_classes=7)", **sizes)
    assert repr(spelled).startswith("Theirs(in_features=1, out_features=7")
    with pytest.raises(UserError, match=r"cannot be built: TypeError: .*unexpected keyword argument"):
        build("own_nets:as_torchvision(width=7)", **sizes)


def test_canonical_keeps_the_module_and_sorts_the_arguments():
    spelled = canonical('own_nets:make_net(act="gelu", drop=0.5)')
    assert spelled == 'own_nets:make_net(drop=0.5, act="gelu")' == canonical(spelled)
    assert canonical("own_nets:make_net(drop=0)") == "own_nets:make_net"


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("no_such_nets:make", "cannot import 'no_such_nets' from the current directory or the path: ModuleNotFound"),
        ("own_broken:make", "cannot import 'own_broken' .*No module named 'no_such_package'"),
        (
            "own_nets:make_nte",
            "unknown function of own_nets 'make_nte': did you mean 'make_net'\\? choose from Theirs, Wide",
        ),
        ("own_nets:number", "model 'own_nets:number' returns int, not a torch.nn.Module"),
        ("own_nets:failing", "model 'own_nets:failing' cannot be built: RuntimeError: no weights here$"),
        ("own_nets:make_net(dropp=1)", "unknown argument of model 'own_nets:make_net' 'dropp': did you mean 'drop'"),
        ("own_nets:make_net(drop=x)", "model 'own_nets:make_net': drop='x' must be a number"),
        (":make", "cannot import ''"),
        ("own_nets.py:make_net", r"'own_nets.py' is a file: name the module, own_nets:make_net$"),
        ("nets/own.py:make", r"name the module, nets.own:make$"),
        ("own_nets", r"own_nets.py may define several networks: name one, as in own_nets:FUNCTION$"),
        ("own_nets:", "cannot read ''"),
    ],
)
def test_a_wrong_spelling_is_one_clear_line(spelling, message):
    with pytest.raises(UserError, match=message) as raised:
        build(spelling, classes=10)
    assert "\n" not in str(raised.value)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (lambda: build("own_nets:fixed", classes=10), "wrong number of classes: model gives 100 logits, data has 10 c"),
        (Pair, "the model gives tuple, not a tensor of logits"),
        (nn.Identity, r"the model gives a tensor of shape \(1, 3, 8, 8\), not logits \(1, 10\)"),
        (lambda: nn.Conv2d(1, 2, 3), r"the model fails on an image of shape \(3, 8, 8\): RuntimeError: Given groups=1"),
    ],
)
def test_check_output_says_what_is_wrong(net, message):
    with pytest.raises(UserError, match=message):
        check_output(net(), (3, 8, 8), classes=10)


def test_check_output_leaves_the_network_as_it_was():
    net = build("small-cnn(width=4)", classes=10)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    check_output(net, (3, 8, 8), classes=10)
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
