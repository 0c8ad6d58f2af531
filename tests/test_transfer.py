"""Examples made on one network and shown to another: by hand, kept in a file, reused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from advalign.attacks import FGSM, MIM, PGD
from advalign.comparison import transfer_matrix
from advalign.data import Images, load
from advalign.errors import UserError
from advalign.evaluation import WORST_CASE, Given, evaluate
from advalign.measure import measure
from advalign.models import build
from advalign.recipes import digits
from advalign.runs import load as load_run
from advalign.threats import Linf
from advalign.training import train
from advalign.transfer import crafted, to_the_end
from tests.conftest import batch, tiny

BUDGET = Linf(0.1)


def images() -> Images:
    x, y = batch(24)
    return Images((x * 255).byte(), y)


def test_all_images_are_attacked_to_the_last_step(tmp_path: Path):
    """Also those that the surrogate gets wrong, and none stops at its boundary."""
    net, given = tiny(0).eval(), images()
    made = crafted(net, given, FGSM(BUDGET), batch_size=7, precision="fp32", seed=0, file=tmp_path / "a")
    x = given.floats()
    torch.testing.assert_close(made, FGSM(BUDGET)(net, x, given.labels), atol=1e-6, rtol=0)
    attack = PGD(BUDGET, steps=3, start="clean")
    assert to_the_end(attack) == replace(attack, until_fooled=False)
    assert to_the_end(MIM(BUDGET)) == MIM(BUDGET, until_fooled=False)
    assert to_the_end(FGSM(BUDGET)) == FGSM(BUDGET)
    made = crafted(net, given, attack, batch_size=7, precision="fp32", seed=0, file=tmp_path / "b")
    expected = replace(attack, until_fooled=False)(net, x, given.labels)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)
    assert (made != x).flatten(1).any(1).all()


def test_examples_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net, given, file = tiny(0).eval(), images(), tmp_path / "kept"
    first = crafted(net, given, PGD(BUDGET, steps=2), batch_size=9, precision="fp32", seed=0, file=file)
    monkeypatch.setattr(PGD, "__call__", None)
    again = crafted(net, given, PGD(BUDGET, steps=2), batch_size=9, precision="fp32", seed=0, file=file)
    assert torch.equal(again, first)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="damaged: remove it"):
        crafted(net, given, PGD(BUDGET, steps=2), batch_size=9, precision="fp32", seed=0, file=file)


def test_given_examples_are_judged_by_the_target_on_what_it_gets_right():
    net, given = tiny(1).eval(), images()
    x = given.floats()
    x_adv = (x + 0.1 * torch.randn(x.shape).sign()).clamp(0, 1)
    far = 1 - x
    found = evaluate(net, given, [FGSM(BUDGET)], given={"a": Given(x_adv, BUDGET), "far": Given(far, None)})
    clean = net(x).argmax(1) == given.labels
    assert torch.equal(found.correct["a"], clean & (net(x_adv).argmax(1) == given.labels))
    assert torch.equal(found.correct["far"], clean & (net(far).argmax(1) == given.labels))
    assert torch.equal(found.outcomes[WORST_CASE], found.correct["a"] & found.correct["fgsm"])
    with pytest.raises(UserError, match="outside"):
        evaluate(net, given, given={"a": Given(far, BUDGET)})


def test_from_the_command_the_same_examples_serve_every_target(tmp_path: Path):
    recipe = replace(digits(), epochs=1, steps=1, subset=256, batch_size=64)
    models = ("small-cnn(width=4)", "small-cnn(width=6)", "small-cnn(width=8)")
    surrogate, *targets = (
        train("natural", data="digits", model=model, recipe=recipe, runs=tmp_path, device="cpu") for model in models
    )
    found = [
        measure(run.path, ["fgsm", "pgd(steps=3)"], surrogate=surrogate.path, eps=0.1, n=100, device="cpu")
        for run in targets
    ]
    kept = list((surrogate.path / "transfer").iterdir())
    assert len(kept) == 2
    names = [record.attack for record in found[0].records]
    assert names[1].startswith("transfer(fgsm, from natural small-cnn(width=4) ")
    assert [record.attack for record in found[1].records] == names
    # By hand, on the first target.
    data = load("digits")
    net, source = load_run(targets[0].path), load_run(surrogate.path)
    from advalign.data import stratified_subset

    test = stratified_subset(data.test, 100, 0)
    x, y = test.floats(), test.labels
    x_adv = FGSM(Linf(0.1))(source, x, y)
    expected = (net(x).argmax(1) == y) & (net(x_adv).argmax(1) == y)
    assert found[0].records[1].accuracy == pytest.approx(float(expected.float().mean()))


def test_saved_examples_and_normalised_weights_from_elsewhere(tmp_path: Path):
    data, net = load("digits"), build("small-cnn(width=4)", classes=10, channels=1).eval()
    torch.save(net.state_dict(), tmp_path / "theirs.pt")
    result = measure(
        tmp_path / "theirs.pt", ["fgsm"], model="small-cnn(width=4)", data="digits", n=50, eps=0.1, mean=(0.3,),
        std=(0.2,), save_examples=True, device="cpu",
    )  # fmt: skip
    arrays = np.load(result.path.with_suffix(".npz"))
    x, x_adv = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["x_adv fgsm"])
    right = net((x_adv - 0.3) / 0.2).argmax(1).numpy() == arrays["y"]
    assert (right == arrays["correct fgsm"]).all()
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    with pytest.raises(UserError, match="one value for each of 1 channels"):
        measure(tmp_path / "theirs.pt", model="small-cnn(width=4)", data="digits", mean=(0.3, 0.3), std=(0.2,))
    assert data.shape == (1, 8, 8)


def test_the_matrix_shows_every_pair(tmp_path: Path):
    recipe = replace(digits(), epochs=1, steps=1, subset=256, batch_size=64)
    models = [f"small-cnn(width={width})" for width in (4, 8)]
    trained = [train("natural", data="digits", model=m, recipe=recipe, runs=tmp_path, device="cpu") for m in models]
    runs = [run.path for run in trained]
    table = transfer_matrix(runs, "pgd(steps=3)", n=60, eps=0.1, device="cpu")
    assert table.columns == ("made on", runs[0].name, runs[1].name)
    assert [row[0] for row in table.rows] == [runs[0].name, runs[1].name, "(clean images)"]
    for i, surrogate in enumerate(runs):
        for j, target in enumerate(runs):
            (_, shown, *_) = measure(target, ["pgd(steps=3)"], surrogate=surrogate, n=60, eps=0.1, device="cpu").records
            assert table.rows[i][j + 1] == f"{100 * shown.accuracy:.1f}"
    with pytest.raises(UserError, match="at least two"):
        transfer_matrix(runs[:1], "fgsm")
