"""Examples made on one network and shown to another: by hand, kept in a file, reused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.networks import tiny
from tests.samples import batch

from advalign.attacks import FGSM, MIM, PGD, parse
from advalign.data import Images, load
from advalign.errors import UserError
from advalign.evaluation.accuracy import WORST_CASE, evaluate
from advalign.evaluation.evaluator import PrecomputedExamples
from advalign.evaluation.measure import measure
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.evaluation.transfer import craft_examples, transferable
from advalign.evaluation.transfer_matrix import transfer_matrix
from advalign.models import build
from advalign.report.transfer_matrix import matrix_table, write_matrix
from advalign.runs import load as load_run
from advalign.runs.checkpoint import save_weights
from advalign.threats import Linf
from advalign.training.recipes import digits
from advalign.training.train import train

BUDGET = Linf(0.1)


def images() -> Images:
    x, y = batch(24)
    return Images((x * 255).byte(), y)


def test_all_images_are_attacked_to_the_last_step(tmp_path: Path):
    """Also those that the surrogate gets wrong, and none stops at its boundary."""
    net, given = tiny(0).eval(), images()
    made = craft_examples(net, given, FGSM(BUDGET), AttackOptions(batch_size=7), file=tmp_path / "a")
    x = given.floats()
    torch.testing.assert_close(made, FGSM(BUDGET)(net, x, given.labels), atol=1e-6, rtol=0)
    attack = PGD(BUDGET, steps=3, start="clean")
    assert transferable(attack) == replace(attack, until_fooled=False)
    assert transferable(MIM(BUDGET)) == MIM(BUDGET, until_fooled=False)
    assert transferable(FGSM(BUDGET)) == FGSM(BUDGET)
    made = craft_examples(net, given, attack, AttackOptions(batch_size=7), file=tmp_path / "b")
    expected = replace(attack, until_fooled=False)(net, x, given.labels)
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)
    assert (made != x).flatten(1).any(1).all()


def test_examples_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    net, given, file = tiny(0).eval(), images(), tmp_path / "kept"
    first = craft_examples(net, given, PGD(BUDGET, steps=2), AttackOptions(batch_size=9), file=file)
    monkeypatch.setattr(PGD, "__call__", None)
    again = craft_examples(net, given, PGD(BUDGET, steps=2), AttackOptions(batch_size=9), file=file)
    assert torch.equal(again, first)
    file.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="damaged, its checksum does not fit: remove it"):
        craft_examples(net, given, PGD(BUDGET, steps=2), AttackOptions(batch_size=9), file=file)


def test_given_examples_are_judged_by_the_target_on_what_it_gets_right():
    net, given = tiny(1).eval(), images()
    x = given.floats()
    x_adv = (x + 0.1 * torch.randn(x.shape).sign()).clamp(0, 1)
    far = 1 - x
    found = evaluate(
        net,
        given,
        [FGSM(BUDGET)],
        precomputed={"a": PrecomputedExamples(x_adv, BUDGET), "far": PrecomputedExamples(far, None)},
    )
    clean = net(x).argmax(1) == given.labels
    assert torch.equal(found.correct["a"], clean & (net(x_adv).argmax(1) == given.labels))
    assert torch.equal(found.correct["far"], clean & (net(far).argmax(1) == given.labels))
    assert torch.equal(found.outcomes[WORST_CASE], found.correct["a"] & found.correct["fgsm"])
    with pytest.raises(UserError, match="outside"):
        evaluate(net, given, precomputed={"a": PrecomputedExamples(far, BUDGET)})


@pytest.mark.slow
def test_from_the_command_the_same_examples_serve_every_target(tmp_path: Path):
    recipe = replace(digits(), epochs=1, steps=1, subset=256, batch_size=64)
    models = ("small-cnn(width=4)", "small-cnn(width=6)", "small-cnn(width=8)")
    surrogate, *targets = (
        train("natural", data="digits", model=model, recipe=recipe, runs=tmp_path, device="cpu") for model in models
    )
    found = [
        measure(
            run.path, ["fgsm", "pgd(steps=3)"], TargetOptions(eps=0.1, n=100, device="cpu"), surrogate=surrogate.path
        )
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
    target = TargetOptions(
        model="small-cnn(width=4)", data="digits", n=50, eps=0.1, mean=(0.3,), std=(0.2,), device="cpu"
    )
    result = measure(tmp_path / "theirs.pt", ["fgsm"], target, save_examples=True)
    arrays = np.load(result.path.with_suffix(".npz"))
    x, x_adv = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["x_adv fgsm"])
    right = net((x_adv - 0.3) / 0.2).argmax(1).numpy() == arrays["y"]
    assert (right == arrays["correct fgsm"]).all()
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    with pytest.raises(UserError, match="one value for each channel each"):
        measure(
            tmp_path / "theirs.pt",
            target_options=TargetOptions(model="small-cnn(width=4)", data="digits", mean=(0.3, 0.3), std=(0.2,)),
        )
    with pytest.raises(UserError, match="one value for each of 1 channels"):
        measure(
            tmp_path / "theirs.pt",
            target_options=TargetOptions(model="small-cnn(width=4)", data="digits", mean=(0.3, 0.3), std=(0.2, 1)),
        )
    assert data.shape == (1, 8, 8)


def test_the_matrix_shows_every_pair(tmp_path: Path):
    recipe = replace(digits(), epochs=1, steps=1, subset=256, batch_size=64)
    models = [f"small-cnn(width={width})" for width in (4, 8)]
    trained = [train("natural", data="digits", model=m, recipe=recipe, runs=tmp_path, device="cpu") for m in models]
    runs = [run.path for run in trained]
    matrix = transfer_matrix(runs, "pgd(steps=3)", TargetOptions(n=60, eps=0.1, device="cpu"))
    table = matrix_table(matrix)
    assert not any((run / "records.jsonl").exists() for run in runs)  # no columns in later reports
    assert table.columns == ("made on", runs[0].name, runs[1].name)
    assert [row[0] for row in table.rows] == [runs[0].name, runs[1].name, "(clean images)"]
    for i, surrogate in enumerate(runs):
        for j, target in enumerate(runs):
            (_, shown, *_) = measure(
                target, ["pgd(steps=3)"], TargetOptions(n=60, eps=0.1, device="cpu"), surrogate=surrogate
            ).records
            assert table.rows[i][j + 1] == f"{100 * shown.accuracy:.1f}"
    file = write_matrix(matrix, tmp_path / "out")
    content = json.loads(file.read_text())
    for i, surrogate in enumerate(runs):
        for j, target in enumerate(runs):
            outcome = content["outcomes"][str(target)][str(surrogate)]
            assert table.rows[i][j + 1] == f"{100 * outcome.count('1') / 60:.1f}"
    assert (content["threat"], content["n"]) == ("Linf(0.1)", 60)
    assert file.with_suffix(".md").read_text().startswith("| made on |")
    assert file.with_suffix(".tex").exists()
    with pytest.raises(UserError, match="at least two"):
        transfer_matrix(runs[:1], "fgsm")
    with pytest.raises(UserError, match="named twice"):
        transfer_matrix([runs[0], runs[0]], "fgsm")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write_matrix(matrix, tmp_path / "file")


def saved(path: Path, **card: object) -> Path:
    net = build("small-cnn(width=4)", classes=10, channels=1)
    save_weights(path, net, {"model": "small-cnn(width=4)", "data": "digits", **card} if card else {})
    return path


@pytest.mark.slow
def test_all_cells_of_a_matrix_are_of_one_threat(tmp_path: Path):
    torch.manual_seed(0)
    weak, strong = (saved(tmp_path / f"{eps}.safetensors", norm="linf", eps=eps) for eps in (0.1, 0.2))
    natural, l2 = saved(tmp_path / "n.safetensors", seed=0), saved(tmp_path / "l2.safetensors", norm="l2", eps=0.5)

    def threat_of(*sources: Path, **more: Any) -> str:
        matrix = transfer_matrix(sources, "fgsm", TargetOptions(n=30, device="cpu", **more))
        return json.loads(write_matrix(matrix, tmp_path / "out").read_text())["threat"]

    with pytest.raises(UserError, match=r"0\.1\.saf.* with Linf\(0\.1\), .*0\.2\.saf.* with Linf\(0\.2\): .*--eps"):
        threat_of(weak, strong)
    assert threat_of(weak, strong, eps=0.05) == "Linf(0.05)"
    assert threat_of(natural, strong) == "Linf(0.2)"
    assert threat_of(natural, l2) == "L2(0.5)"
    with pytest.raises(UserError, match=r"with linf, .* with l2: say which with --norm"):
        threat_of(weak, l2, eps=0.05)
    assert threat_of(weak, l2, eps=0.05, norm="l2") == "L2(0.05)"
    with pytest.raises(UserError, match=r"--norm l2 needs its radius, --eps: the models were trained in Linf\(0\.1\)"):
        threat_of(weak, natural, norm="l2")
    with pytest.raises(UserError, match=r"with digits, .* with cifar10: say which with --data"):
        threat_of(weak, saved(tmp_path / "c.safetensors", data="cifar10"))


def test_weights_from_elsewhere_are_surrogates_and_cells_of_a_matrix(tmp_path: Path):
    torch.manual_seed(0)
    target, theirs = saved(tmp_path / "target.safetensors", norm="linf", eps=0.1), tmp_path / "theirs.pt"
    net = build("small-cnn(width=6)", classes=10, channels=1).eval()
    torch.save(net.state_dict(), theirs)
    spelled = f"small-cnn(width=6)@{theirs}"
    result = measure(target, ["fgsm"], TargetOptions(n=40, device="cpu"), surrogate=spelled, save_examples=True)
    assert result.records[1].attack.startswith("transfer(fgsm, from theirs.pt small-cnn(width=6) ")
    arrays = np.load(result.path.with_suffix(".npz"))
    x, y = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["y"])
    x_adv = torch.from_numpy(arrays[f"x_adv {result.records[1].attack}"])
    torch.testing.assert_close(x_adv, FGSM(Linf(0.1))(net, x, y), atol=1e-6, rtol=0)
    matrix = transfer_matrix([target, spelled], "fgsm", TargetOptions(n=40, device="cpu"))
    assert matrix_table(matrix).rows[1][1] == f"{100 * result.records[1].accuracy:.1f}"
    for call in (
        lambda: measure(target, ["fgsm"], TargetOptions(n=40, device="cpu"), surrogate=theirs),
        lambda: transfer_matrix([target, theirs], "fgsm", TargetOptions(n=40, device="cpu")),
    ):
        with pytest.raises(UserError, match=r"theirs\.pt does not say its model: write MODEL@.*theirs\.pt"):
            call()


def test_examples_are_of_the_part_and_the_labels_that_they_were_made_with(tmp_path: Path):
    target, both = saved(tmp_path / "target.safetensors", norm="linf", eps=0.1), tmp_path / "both.pt"
    nets = {}
    for seed, name in enumerate(("model", "ema")):
        torch.manual_seed(seed)
        nets[name] = build("small-cnn(width=4)", classes=10, channels=1).eval()
    torch.save({name: net.state_dict() for name, net in nets.items()}, both)
    digits_test = load("digits").test
    x, y = digits_test.pixels[:24], digits_test.labels[:24]
    for shift in (0, 1):
        np.savez(tmp_path / "some.npz", x_test=x[:, 0].numpy(), y_test=((y + shift) % 10).numpy())
        for name, net in nets.items():
            options = TargetOptions(data=f"npz:{tmp_path / 'some.npz'}", device="cpu")
            result = measure(
                target, ["fgsm"], options, surrogate=f"small-cnn(width=4)@{both}#{name}", save_examples=True,
            )  # fmt: skip
            arrays = np.load(result.examples_path)
            made = torch.from_numpy(arrays[f"x_adv {result.records[1].attack}"])
            expected = FGSM(Linf(0.1))(net, x.float() / 255, (y + shift) % 10)
            torch.testing.assert_close(made, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square", "worst(pgd, mim)", "autoattack"]
)
def test_attacks_that_stop_at_the_surrogates_boundary_are_refused(attack: str, tmp_path: Path):
    """Before anything is read: there are no such models."""
    with pytest.raises(
        UserError, match=r"stops once it fools the surrogate.*: transfer fgsm, pgd, mim, min-margin, cw$"
    ):
        measure(tmp_path / "a", [attack], surrogate=tmp_path / "b")
    with pytest.raises(UserError, match="stops once"):
        transferable(parse(attack, threat=BUDGET))


def test_crafting_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped after the second of four batches; a random start tells whether the third has its own seed."""
    monkeypatch.setattr("advalign.evaluation.state.SAVE_SECONDS", -1.0)
    net, given, attack = tiny(0).eval(), images(), PGD(BUDGET, steps=2)
    how = AttackOptions(batch_size=7, seed=3)
    whole = craft_examples(net, given, attack, how, file=tmp_path / "whole")
    done: list[int] = []

    def stop(images: int) -> None:
        done.append(images)
        if len(done) == 2 + 1:  # the first call is for what was there before
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        craft_examples(net, given, attack, how, file=tmp_path / "parts", advance=stop)
    assert not (tmp_path / "parts").exists()
    again: list[int] = []
    assert torch.equal(craft_examples(net, given, attack, how, file=tmp_path / "parts", advance=again.append), whole)
    assert again == [14, 7, 3]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts", "whole"]
