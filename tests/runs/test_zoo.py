"""Published models by name: the table, files in published layouts beside a plain second implementation, the check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import Tensor

from advalign import models
from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.published import compare_published
from advalign.report.card import published_fields
from advalign.runs import find_weights, load
from advalign.runs import zoo as module
from advalign.runs.zoo import ZooModel, zoo

State = dict[str, Tensor]


class Layout(NamedTuple):
    """How a family of files names its tensors, and what its forward pass does with them."""

    model: str
    stem: str
    block: str
    names: tuple[str, str, str, str, str]
    """Of a block: first norm and convolution, second norm and convolution, shortcut."""
    norm: str
    head: str
    widths: tuple[int, ...]
    start: int = 64
    blocks: int = 2
    kernel: int = 1
    raw: bool = False
    same: bool = False
    activation: Callable[[Tensor], Tensor] = F.relu
    shift: float = 0.0
    scale: float = 1.0
    wrap: Callable[[State], Any] = lambda state: state


TRADES = Layout(
    "wide-resnet(depth=16, width=8)", "conv1", "block{}.layer.{}.", ("bn1", "conv1", "bn2", "conv2", "convShortcut"),
    "bn1", "fc", (8, 16, 32), start=16,
)  # fmt: skip
DM_WRN = Layout(
    'normalized(model="dm-wide-resnet(depth=16, width=8)", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))', "init_conv",
    "layer.{}.block.{}.", ("batchnorm_0", "conv_0", "batchnorm_1", "conv_1", "shortcut"), "batchnorm", "logits",
    (8, 16, 32), start=16, same=True, activation=F.silu, shift=0.5, scale=0.25,
)  # fmt: skip
DM_PREACT = Layout(
    'normalized(model="dm-preact-resnet18(width=4)", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))', "conv_2d",
    "layer_{}.{}.", ("batchnorm_0", "conv_2d_1", "batchnorm_1", "conv_2d_2", "shortcut"), "batchnorm", "logits",
    (4, 8, 16, 32), start=4, kernel=3, raw=True, same=True, activation=F.silu, shift=0.5, scale=0.25,
)  # fmt: skip
PREACT = Layout(
    "preact-resnet18(width=4)", "conv1", "layer{}.{}.", ("bn1", "conv1", "bn2", "conv2", "shortcut.0"), "bn", "linear",
    (4, 8, 16, 32), start=4,
)  # fmt: skip
LAYOUTS = {
    "trades": TRADES,
    "trades, with sub_block1, in DataParallel": TRADES._replace(
        wrap=lambda state: {
            "state_dict": {f"module.{name}": each for name, each in {**state, **_copies(state)}.items()}, "epoch": 3
        }
    ),
    "deepmind wrn": DM_WRN,
    "deepmind wrn, relu": DM_WRN._replace(
        model=DM_WRN.model.replace("width=8", 'width=8, activation=\\"relu\\"'), activation=F.relu
    ),
    "deepmind preact": DM_PREACT,
    "preact, v2": PREACT,
    "preact, v1 without a last norm, under a key": PREACT._replace(
        model="preact-resnet18(width=4, final_norm=False, raw_shortcut=True)", norm="", raw=True,
        wrap=lambda state: {"last": state},
    ),
}  # fmt: skip


def _copies(state: State) -> State:
    return {name.replace("block1", "sub_block1"): each * 2 for name, each in state.items() if "block1" in name}


def prefixes(layout: Layout) -> list[tuple[str, int, int, int]]:
    """Each block's prefix, with its channels in and out and its stride."""
    first, found, c_in = (1 if "block{}" in layout.block or "layer{}" in layout.block else 0), [], layout.start
    for g, width in enumerate(layout.widths):
        for i in range(layout.blocks):
            found.append((layout.block.format(first + g, i), c_in, width, 2 if g and not i else 1))
            c_in = width
    return found


def published_state(layout: Layout) -> State:
    """Random tensors by the names and in the order of the published files."""
    torch.manual_seed(0)
    state: State = {}

    def norm(name: str, c: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = 0.5 + torch.rand(c), 0.3 * torch.randn(c)
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = 0.3 * torch.randn(c), 0.5 + torch.rand(c)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def conv(name: str, c_in: int, c_out: int, kernel: int) -> None:
        state[f"{name}.weight"] = torch.randn(c_out, c_in, kernel, kernel) * (2 / (c_in * kernel**2)) ** 0.5

    conv(layout.stem, 3, layout.start, 3)
    bn1, conv1, bn2, conv2, shortcut = layout.names
    for prefix, c_in, c_out, stride in prefixes(layout):
        norm(prefix + bn1, c_in)
        conv(prefix + conv1, c_in, c_out, 3)
        norm(prefix + bn2, c_out)
        conv(prefix + conv2, c_out, c_out, 3)
        if stride > 1 or c_in != c_out:
            conv(prefix + shortcut, c_in, c_out, layout.kernel)
    if layout.norm:
        norm(layout.norm, layout.widths[-1])
    state[f"{layout.head}.weight"] = torch.randn(10, layout.widths[-1])
    state[f"{layout.head}.bias"] = torch.randn(10)
    return state


def published_logits(layout: Layout, s: State, x: Tensor) -> Tensor:
    """The forward pass of the published code, on plain tensors."""

    def norm(x: Tensor, name: str) -> Tensor:
        shape = (1, -1, 1, 1)
        centred = (x - s[f"{name}.running_mean"].view(shape)) / (s[f"{name}.running_var"].view(shape) + 1e-5).sqrt()
        return centred * s[f"{name}.weight"].view(shape) + s[f"{name}.bias"].view(shape)

    def padded(x: Tensor, stride: int) -> Tensor:
        return F.pad(x, (0, 1, 0, 1) if layout.same and stride == 2 else (1, 1, 1, 1))

    x = F.conv2d((x - layout.shift) / layout.scale, s[f"{layout.stem}.weight"], padding=1)
    bn1, conv1, bn2, conv2, shortcut = layout.names
    for prefix, _, _, stride in prefixes(layout):
        active = layout.activation(norm(x, prefix + bn1))
        out = F.conv2d(padded(active, stride), s[f"{prefix}{conv1}.weight"], stride=stride)
        out = F.conv2d(padded(layout.activation(norm(out, prefix + bn2)), 1), s[f"{prefix}{conv2}.weight"])
        if f"{prefix}{shortcut}.weight" in s:
            kept = x if layout.raw else active
            kept = padded(kept, stride) if layout.kernel == 3 else kept
            x = F.conv2d(kept, s[f"{prefix}{shortcut}.weight"], stride=stride)
        x = x + out
    if layout.norm:
        x = layout.activation(norm(x, layout.norm))
    return x.mean((2, 3)) @ s[f"{layout.head}.weight"].T + s[f"{layout.head}.bias"]


def entry(layout: Layout, **given: Any) -> ZooModel:
    about = {"key": "Mine", "data": "cifar10", "norm": "linf", "eps": 8 / 255, "clean": 90.0, "autoattack": 50.0}
    text = {"paper": "P", "link": "l", "authors": "A", "venue": "V", "architecture": "W"}
    return ZooModel(**{**about, **text, "additional_data": True, "model": layout.model, **given})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_file_in_a_published_layout_gives_the_published_logits(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "zoo", lambda: {"Mine": entry(layout)})
    state, x = published_state(layout), torch.rand(3, 3, 16, 16)
    torch.save(layout.wrap(state), tmp_path / "file.pt")
    net = load(f"zoo:Mine@{tmp_path / 'file.pt'}")
    with torch.no_grad():
        assert torch.allclose(net(x), published_logits(layout, state, x), atol=1e-4, rtol=1e-4)
        other = layout._replace(same=not layout.same, raw=not layout.raw if layout.kernel == 3 else layout.raw)
        assert not torch.allclose(net(x), published_logits(other, state, x), atol=1e-2)


def test_every_entry_of_the_table_is_spelled_and_has_numbers():
    assert len(zoo()) > 95
    for key, model in zoo().items():
        assert key == model.key
        assert (0 < model.clean < 100, 0 <= model.autoattack < model.clean) == (True, True), key
        assert (model.data, model.norm) in {("cifar10", "linf"), ("cifar10", "l2"), ("cifar100", "linf")}
        assert key.startswith({"cifar10": "l2/" if model.norm == "l2" else "", "cifar100": "cifar100/"}[model.data])
        assert models.canonical(model.model)
    anchors = {
        "Rade2021Helper_R18_ddpm": 86.86,
        "Gowal2021Improving_R18_ddpm_100m": 87.35,
        "Wang2023Better_WRN-28-10": 92.44,
    }
    assert {key: zoo()[key].clean for key in anchors} == anchors


@pytest.mark.slow
def test_every_entry_of_the_table_can_be_built():
    with torch.device("meta"):
        for spelling in {model.model for model in zoo().values()}:
            models.build(spelling, classes=10)


def test_names_are_refused_with_the_nearest_and_files_must_be_there(tmp_path: Path):
    for source, words in {
        "zoo:Wang2023Beter_WRN-28-10@x.pt": "did you mean 'Wang2023Better_WRN-28-10'",
        "zoo:Standard": "write zoo:Standard@FILE",
        "zoo:Standard@nowhere.pt": "no run folder or weights file 'nowhere.pt'",
    }.items():
        with pytest.raises(UserError, match=words):
            find_weights(source)
    with pytest.raises(UserError, match="leave out --model"):
        find_weights("zoo:Standard@x.pt", model="resnet18")


def test_the_published_clean_accuracy_is_checked_and_the_card_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    layout, x = DM_PREACT, np.random.default_rng(0).integers(0, 256, (80, 3, 16, 16)).astype(np.uint8)
    state = published_state(layout)
    y = published_logits(layout, state, torch.from_numpy(x) / 255).argmax(1).numpy()
    y[:20] = (y[:20] + 1) % 10
    np.savez(tmp_path / "own.npz", x_test=x, y_test=y, class_names=[f"class {k}" for k in range(10)])
    torch.save(state, tmp_path / "file.pt")
    data = f"npz:{tmp_path / 'own.npz'}"
    named, options = f"zoo:Mine@{tmp_path / 'file.pt'}", TargetOptions(device="cpu")
    monkeypatch.setattr(module, "zoo", lambda: {"Mine": entry(layout, data=data, clean=75.0)})
    measured = measure(named, ["fgsm"], options)
    assert measured.records[0].accuracy == 0.75
    assert {(r.method, r.threat, r.data) for r in measured.records} == {("Mine", "Linf(8/255)", data)}
    assert "published clean accuracy 75.00 %, measured 75.00 % on 80 images" in measured.note
    assert not [text for text in measured.evaluation.warnings if "published" in text]
    assert measured.published is not None
    assert published_fields(measured.published) == {
        "link": "l", "name": "P", "authors": "A", "additional_data": True, "venue": "V", "architecture": "W",
        "reported": "50.00",
    }  # fmt: skip
    monkeypatch.setattr(module, "zoo", lambda: {"Mine": entry(layout, data=data, clean=95.0)})
    other = measure(named, ["none"], options)
    assert "Mine was published with 95.00 %: this is another file" in other.evaluation.warnings[0]
    assert "agree" not in other.note
    assert json.loads(other.path.read_text())["warnings"][0] == other.evaluation.warnings[0]


def test_on_all_images_it_must_agree_to_the_second_digit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "zoo", lambda: {"Mine": entry(TRADES, clean=92.44)})
    card = entry(TRADES).card()
    for right, agrees in {9244: True, 9246: True, 9234: False, 9260: False}.items():
        note, warning = compare_published(card, "cifar10", torch.arange(10_000) < right)
        assert (bool(note), bool(warning)) == (agrees, not agrees)
    # On 1,000 of them the exact binomial distribution gives a published model one false alarm in a thousand.
    alarms = [bool(compare_published(card, "cifar10", torch.arange(1000) < right)[1]) for right in range(860, 1001)]
    assert 0.0003 < float(binom.pmf(range(860, 1001), 1000, 0.9244)[alarms].sum()) < 0.0015
    assert compare_published(card, "digits", torch.ones(5).bool()) == ("", "")
    assert compare_published({}, "cifar10", torch.ones(5).bool()) == ("", "")
