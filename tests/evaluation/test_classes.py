"""The classes of data and model are matched by name: reordered, in part, or refused, and said."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from advalign import models
from advalign.data import Dataset, Images
from advalign.errors import UserError
from advalign.evaluation.diagnose_source import diagnose_source
from advalign.evaluation.measure import measure
from advalign.evaluation.options import TargetOptions
from advalign.evaluation.transfer_matrix import transfer_matrix
from advalign.report.transfer_matrix import matrix_table, write_matrix
from advalign.runs.checkpoint import save_weights
from advalign.runtime.seeds import seeded

NAMES = ("cat", "dog", "owl", "yak")
MODEL = "small-cnn(width=2)"
CARD = {"method": "at", "data": "animals", "model": MODEL, "classes": 4, "channels": 1, "shape": [1, 8, 8]}
CARD |= {"norm": "linf", "eps": 0.01}


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    with seeded(3):
        return models.build(MODEL, classes=4, channels=1).eval()


@pytest.fixture(scope="module")
def images(net: torch.nn.Module) -> Images:
    """Images of all four classes as the network sees them; of every fifth, the label is another."""
    pixels = torch.randint(0, 256, (400, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    with torch.no_grad():
        outputs = net(pixels / 255)
    labels = (outputs - outputs.mean(0)).argmax(1)  # of a bias towards one class, nothing is left
    rows = torch.cat([(labels == k).nonzero()[:10, 0] for k in range(4)]).sort().values
    return Images(pixels[rows], labels[rows])


def weights(folder: Path, net: torch.nn.Module, **card: Any) -> Path:
    save_weights(folder / "net.safetensors", net, {**CARD, "class_names": NAMES, **card})
    return folder / "net.safetensors"


def data(images: Images, names: tuple[str, ...], labels: torch.Tensor, **more: Any) -> TargetOptions:
    test = Images(images.pixels, labels)
    return TargetOptions(data=Dataset("zoo", test.take([]), test, names, **more), device="cpu")


def outcomes(source: Path, which: TargetOptions, console: Console | None = None) -> dict[str, Any]:
    return json.loads(measure(source, ["fgsm"], which, console=console).path.read_text())


def test_the_order_of_the_names_changes_no_outcome(tmp_path: Path, net: torch.nn.Module, images: Images):
    file = weights(tmp_path, net)
    expected = outcomes(file, data(images, NAMES, images.labels))
    assert 0 < expected["outcomes"]["clean"].count("1") < 40
    assert (expected["note"], expected["class_names"], "classes" in expected) == ("", list(NAMES), False)
    order = [2, 0, 3, 1]
    numbers = torch.tensor([order.index(k) for k in range(4)])[images.labels]
    shown = io.StringIO()
    other = outcomes(file, data(images, tuple(NAMES[k] for k in order), numbers), Console(file=shown, width=200))
    assert other["outcomes"] == expected["outcomes"]
    assert other["class_names"] == list(NAMES)
    assert other["classes"] == ["owl", "cat", "yak", "dog"]
    assert other["note"] == "the labels are in another order than the model's, and matched to it by name"
    assert other["note"] in shown.getvalue()
    by_position = measure(file, ["none"], data(images, NAMES, numbers)).path.read_text()
    assert json.loads(by_position)["outcomes"]["clean"] != expected["outcomes"]["clean"]


def test_some_of_the_classes_are_measured_with_all_logits(tmp_path: Path, net: torch.nn.Module, images: Images):
    file = weights(tmp_path, net)
    rows = ((images.labels == 3) | (images.labels == 1)).nonzero()[:, 0]
    part = images.take(rows)
    found = outcomes(file, data(part, ("dog", "yak"), (part.labels == 3).long()))
    with torch.no_grad():
        expected = net(part.floats()).argmax(1) == part.labels
    assert found["outcomes"]["clean"] == "".join(str(int(right)) for right in expected)
    assert found["note"] == "2 of 4 classes: dog, yak"
    whole = outcomes(file, data(images, NAMES, images.labels))["outcomes"]["fgsm"]
    assert found["outcomes"]["fgsm"] == "".join(whole[row] for row in rows)
    assert found["records"][0]["n"] == 20


def test_a_renamed_class_is_refused(tmp_path: Path, net: torch.nn.Module, images: Images):
    file = weights(tmp_path, net)
    message = (
        r"^zoo has classes that .* does not know: Cat, wolf; those of the model are cat, dog, owl, yak; is 'Cat' .*$"
    )
    renamed = data(images, ("Cat", "dog", "owl", "wolf"), images.labels)
    for verb in (measure, diagnose_source):
        with pytest.raises(UserError, match=message):
            verb(file, target_options=renamed)
    with pytest.raises(UserError, match=message):
        transfer_matrix([file, f"{MODEL}@{file}"], options=renamed)
    assert not list(tmp_path.rglob("*.json"))


def test_without_names_labels_are_the_models_numbers(tmp_path: Path, net: torch.nn.Module, images: Images):
    file, numbers = weights(tmp_path, net), ("0", "1", "2", "3")
    named = outcomes(file, data(images, NAMES, images.labels))
    unnamed = outcomes(file, data(images, numbers, images.labels, named=False))
    assert unnamed["outcomes"] == named["outcomes"]
    assert unnamed["note"] == "the labels have no names, and are taken as the numbers of the model's classes"
    part = images.take((images.labels < 2).nonzero()[:, 0])
    assert outcomes(file, data(part, ("0", "1"), part.labels, named=False))["note"].startswith("2 of 4 classes: cat, ")
    with pytest.raises(UserError, match=r"wrong number of classes: .* has 4, the data set zoo has 5"):
        outcomes(file, data(images, (*numbers, "4"), images.labels, named=False))
    with_training = Dataset("zoo", part, part, ("0", "1"), named=False)
    with pytest.raises(UserError, match=r"wrong number of classes: .* has 4, the data set zoo has 2"):
        outcomes(file, TargetOptions(data=with_training))


@pytest.mark.parametrize("names", [NAMES, ("0", "1", "2", "3")])
def test_a_model_without_names_is_matched_by_position(
    tmp_path: Path, net: torch.nn.Module, images: Images, names: tuple[str, ...]
):
    file = weights(tmp_path, net, class_names=[])
    found = outcomes(file, data(images, names, images.labels, named=names is NAMES))
    assert found["class_names"] == list(names)
    assert found["note"] == ""


def test_weights_from_elsewhere_tell_how_many_classes_test_images_may_lack(
    tmp_path: Path, net: torch.nn.Module, images: Images
):
    torch.save(net.state_dict(), tmp_path / "net.pt")
    part = images.take((images.labels < 3).nonzero()[:, 0])
    np.savez(tmp_path / "part.npz", x_test=part.pixels.numpy(), y_test=part.labels.numpy())
    which = TargetOptions(data=f"npz:{tmp_path / 'part.npz'}", model=MODEL, device="cpu")
    found = outcomes(tmp_path / "net.pt", which)
    with torch.no_grad():
        expected = net(part.floats()).argmax(1) == part.labels
    assert found["outcomes"]["clean"] == "".join(str(int(right)) for right in expected)
    assert found["note"] == "3 of 4 classes: 0, 1, 2"


def test_a_matrix_says_the_classes_of_each_model(tmp_path: Path, net: torch.nn.Module, images: Images):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    sources = [weights(tmp_path / "a", net), weights(tmp_path / "b", net, class_names=NAMES[::-1])]
    part = images.take((images.labels < 2).nonzero()[:, 0])
    matrix = transfer_matrix(sources, "fgsm", data(part, NAMES[:2], part.labels))
    content = json.loads(write_matrix(matrix, tmp_path / "out").read_text())
    assert list(content["class_names"].values()) == [list(NAMES), list(NAMES[::-1])]
    first, second = content["notes"].values()
    assert first == "2 of 4 classes: cat, dog"
    assert second.startswith("2 of 4 classes: dog, cat; the labels are in another order than the model's, and matched")
    assert matrix_table(matrix).caption.endswith(f"test images: 20. Images: {first}. Images: {second}.")


def test_models_of_other_orders_attack_the_same_classes(tmp_path: Path, net: torch.nn.Module, images: Images):
    """A surrogate with its classes in another order makes the examples that it would make in the target's order."""
    order = [3, 1, 0, 2]
    with seeded(3):
        turned = models.build(MODEL, classes=4, channels=1).eval()
    head = list(turned.state_dict())[-2:]
    turned.load_state_dict({k: v[order] if k in head else v for k, v in net.state_dict().items()})
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        folder.mkdir()
    target, same = (weights(folder, net) for folder in folders[:2])
    other = weights(folders[2], turned, class_names=[NAMES[k] for k in order])
    which = data(images, NAMES, images.labels)
    made = [measure(target, ["pgd(steps=3)"], which, surrogate=source).evaluation for source in (same, other)]
    (_, first), (_, second) = (evaluation.correct.values() for evaluation in made)
    assert torch.equal(first, second)
    assert first.any()
    assert not first.all()
