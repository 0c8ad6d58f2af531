"""What a report says of run folders: by class, over the radius, examples, verdicts, commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.samples import RECORD

from advalign.cli import commands as cli
from advalign.data import load
from advalign.errors import UserError
from advalign.evaluation.measure import measure
from advalign.evaluation.options import AttackOptions, TargetOptions
from advalign.report import sections
from advalign.report.classes import by_class, class_table, dataset_of, labels_of, outcomes_of
from advalign.report.diagnosis import remarks_table, verdicts_table
from advalign.report.examples import read_examples
from advalign.report.gallery import gallery, gallery_in_words
from advalign.report.page import FigureSection, write_page
from advalign.report.radius import radii_of, radius_curves
from advalign.runs import Record, Run
from advalign.runs import load as load_net
from advalign.training.recipes import digits
from advalign.training.train import train

QUICK = replace(digits(), epochs=1, steps=1, batch_size=128, subset=256)


def test_accuracy_by_class_is_a_share_of_the_class_and_a_mean_over_seeds():
    labels = torch.tensor([0, 0, 1, 1, 1, 1])
    one, two = torch.tensor([1, 0, 1, 1, 1, 1]).bool(), torch.tensor([1, 1, 0, 0, 0, 1]).bool()
    clean, unseen = by_class([one, two], labels, 3)[:2], by_class([one], labels, 3)[2]
    assert clean == [75, 62.5]  # (50 + 100) / 2, (100 + 25) / 2
    table = class_table({"at": ([*clean, unseen], [0, 0, 0])}, ("a", "b", "c"), "")
    assert table.columns == ("class", "at: clean", "at: robust")
    assert table.rows == (("a", "75.0", "0.0"), ("b", "62.5", "0.0"), ("c", "–", "0.0"))


def evaluation(worst: float):
    accuracies = {"clean": 0.75, "fgsm": 0.5, "pgd": 0.5, "cw": 0.0, "worst(fgsm, pgd)": worst}
    return {
        "outcomes": {"clean": "1110", "fgsm": "1100", "pgd": "0110", "cw": "0000"},
        "records": [{"attack": attack, "accuracy": accuracy} for attack, accuracy in accuracies.items()],
    }


def test_the_worst_case_is_what_withstands_its_attacks_and_no_others():
    clean, robust = outcomes_of(evaluation(0.25), "worst(fgsm, pgd)")
    assert clean.tolist() == [True, True, True, False]
    assert robust.tolist() == [False, True, False, False]  # cw leaves the threat model: the name has it not
    with pytest.raises(UserError, match=r"outcomes give 0.25"):
        outcomes_of(evaluation(0.5), "worst(fgsm, pgd)")


def test_labels_are_those_of_the_images_that_were_measured(tmp_path: Path):
    run = train("natural", data="digits", model="small-cnn(width=4)", recipe=QUICK, runs=tmp_path, device="cpu")
    measured = measure(run.path, ["none"], TargetOptions(n=40, device="cpu"), save_examples=True)
    with np.load(measured.path.with_suffix(".npz")) as arrays:
        assert labels_of(load("digits"), 40).tolist() == arrays["y"].tolist()


def test_other_data_under_the_same_name_are_refused_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UserError, match="digits is not what was measured"):
        dataset_of("digits", "0123", 8, None)
    monkeypatch.delenv("ADVALIGN_DATA", raising=False)
    monkeypatch.setenv("ADVALIGN_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"cifar10 is not in {tmp_path}"):
        dataset_of("cifar10", "0123", 32, None)
    assert list(tmp_path.iterdir()) == []


def test_accuracy_over_the_radius_is_that_of_the_attack_measured_most():
    records = [
        RECORD,
        *(replace(RECORD, attack="pgd", threat=f"Linf({eps})", accuracy=a) for eps, a in (("1/10", 0.7), ("0.2", 0.5))),
        replace(RECORD, attack="fgsm", accuracy=0.9),
    ]
    attack, curve = radii_of(records)
    assert attack == "pgd"
    assert curve == {0.0: (0.95, 500), 0.1: (0.7, 500), 0.2: (0.5, 500)}
    (line, *_) = radius_curves({"at": curve}).axes[0].lines
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), [95, 70, 50])
    assert radii_of([RECORD, replace(RECORD, attack="fgsm")])[1] == {}


def test_verdicts_of_several_models():
    def diagnosis(**verdicts: str):
        rows = [{"name": name, "passed": passed, "sentence": f"{name}!"} for name, passed in verdicts.items()]
        return {"n": 50, "threat": "Linf(0.2)", "verdicts": rows}

    both = {"a": diagnosis(logits="pass", steps="warn"), "b": diagnosis(logits="fail")}
    assert verdicts_table(both).rows == (("a", "pass", "warn"), ("b", "fail", "–"))
    assert remarks_table(both).rows == (("a", "steps", "warn", "steps!"), ("b", "logits", "fail", "logits!"))


@pytest.mark.slow
def test_a_report_on_run_folders_has_every_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        run = train("at", data="digits", model="small-cnn(width=4)", recipe=replace(QUICK, seed=seed), device="cpu")
        cli.main(["evaluate", str(run.path), "--attacks", "fgsm", "pgd(steps=2)", "--save-examples"])
        cli.main(["evaluate", str(run.path), "--attacks", "fgsm", "--eps", "0.1"])
    cli.main(["diagnose", str(run.path), "--n", "10"])
    cli.main(["report", "runs", "--out", "out/page.html", "--maps", "1"])
    text = Path("out/page.html").read_text()
    for heading in (
        "Accuracy: digits, Linf(0.2), n = 500",
        "Accuracy: digits, Linf(0.1), n = 500",
        "Accuracy by class: digits, Linf(0.2), n = 500",
        "Adversarial examples: digits, Linf(0.2), n = 500",
        "Features: digits, Linf(0.2)",
        "Accuracy over the radius: digits, Linf",
        "Training",
        "Can the numbers be trusted?",
        "The commands that repeat them",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert "<h2>Trade-off" not in text  # of one model
    assert "Accuracy by class: digits, Linf(0.1)" not in text
    assert f"at, seed 1 ({run.id})" in text
    assert "advalign train at --data digits" in text
    assert "<li>Adversarial examples: digits, Linf(0.1)" not in text
    assert "Adversarial examples, digits, Linf(0.1), n = 500: none were saved" in text
    shown = Path("out/page-files/accuracy-by-class-in-numbers-digits-linf-0-2-n-500.csv").read_text().splitlines()
    labels, found = load("digits").test.labels, []
    for each in map(Run.read, Path("runs").iterdir()):
        file = next(f for f in (each.path / "evaluations").glob("*.json") if f.with_suffix(".npz").exists())
        flags = np.array(list(json.loads(file.read_text())["outcomes"]["clean"])) == "1"
        found.append(100 * flags[(labels == 0).numpy()].mean())
    assert shown[1].split(",")[1] == f"{np.mean(found):.1f}"


def test_examples_are_the_first_of_each_class_under_the_strongest_attack(tmp_path: Path):
    x = np.arange(5, dtype=np.float32).reshape(5, 1, 1, 1) / 10
    arrays = {"x": x, "y": np.array([1, 1, 0, 0, 2]), "class_names": np.array(["cat", "dog", "elk"])}
    for name, predicted in (("fgsm", [0, 1, 0, 2, 0]), ("pgd+", [2, 0, 0, 1, 0])):
        correct = np.array(predicted) == arrays["y"]
        arrays |= {f"x_adv {name}": x + len(name) / 100, f"correct {name}": correct, f"predicted {name}": predicted}
    np.savez(tmp_path / "a.npz", **arrays)  # pyright: ignore[reportArgumentType]  its stub thinks of allow_pickle
    accuracies = {"clean": 0.75, "fgsm": 0.5, "pgd+": 0.25}
    records = [{"attack": attack, "accuracy": accuracy} for attack, accuracy in accuracies.items()]
    evaluation = {"records": records, "outcomes": {"clean": "11110"}}
    shown, x_adv, captions, attack = read_examples(tmp_path / "a.npz", evaluation)
    assert attack == "pgd+"
    np.savez(tmp_path / "none.npz", x=x)
    (tmp_path / "cut.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    for name, words in (("none", "holds no adversarial images"), ("cut", "is damaged, its checksum does not fit")):
        with pytest.raises(UserError, match=words):
            read_examples(tmp_path / f"{name}.npz", evaluation)
    np.testing.assert_allclose(shown.flatten(), [0.2, 0.0, 0.4], atol=1e-6)
    np.testing.assert_allclose(x_adv.flatten(), [0.24, 0.04, 0.44], atol=1e-6)
    assert captions == [
        "true cat\npredicted cat\nwithstands",
        "true dog\npredicted elk\nfooled",
        "true elk\npredicted cat\nwrong before",
    ]
    del arrays["class_names"]
    np.savez(tmp_path / "old.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="holds no predictions"):
        read_examples(tmp_path / "old.npz", {"records": records, "outcomes": {"clean": "11110"}})


def test_predictions_are_those_of_the_run_s_network(tmp_path: Path):
    run = train("natural", data="digits", model="small-cnn(width=4)", recipe=QUICK, runs=tmp_path, device="cpu")
    target = TargetOptions(n=60, eps=0.1, device="cpu")
    measured = measure(run.path, ["fgsm"], target, AttackOptions(batch_size=16), save_examples=True)
    net = load_net(run.path)
    with np.load(measured.path.with_suffix(".npz")) as arrays, torch.no_grad():
        assert arrays["class_names"].tolist() == list(load("digits").class_names)
        for images, predicted in (("x", "predicted"), ("x_adv fgsm", "predicted fgsm")):
            assert net(torch.from_numpy(arrays[images])).argmax(1).tolist() == arrays[predicted].tolist()
        right = measured.evaluation.correct["clean"].numpy()
        assert (right == (arrays["predicted"] == arrays["y"])).all()
        assert (arrays["correct fgsm"] == (right & (arrays["predicted fgsm"] == arrays["y"]))).all()


def test_the_gallery_is_told_in_words(tmp_path: Path):
    x = torch.zeros(2, 1, 1, 1)
    bands = {"at": (x, x, ["true cat\npredicted <dog>\nfooled", "true elk\npredicted elk\nwithstands"])}
    said = "at: true cat, predicted <dog>, fooled; true elk, predicted elk, withstands."
    assert gallery_in_words(bands) == said
    plate = FigureSection("Examples", gallery(bands, amplify=1), "Seen.", gallery_in_words(bands))
    write_page(tmp_path / "page.html", "", [], None, [plate], {})
    text = (tmp_path / "page.html").read_text()
    escaped = said.replace("<dog>", "&lt;dog&gt;")
    assert f'aria-label="Examples. {escaped}"' in text
    assert f'alt="{escaped}"' in text
    assert '<p class="note">Seen.</p>' in text


def test_a_curve_over_the_radius_is_of_one_checkpoint_and_one_number_of_images():
    def record(checkpoint: str, n: int, threat: str, attack: str, accuracy: float) -> Record:
        changes = {"checkpoint": checkpoint, "n": n, "threat": threat, "attack": attack, "accuracy": accuracy}
        return replace(RECORD, **changes)

    records = [
        *(record("best", 1000, f"Linf({eps})", "clean", 0.9) for eps in ("4/255", "8/255")),
        record("best", 1000, "Linf(4/255)", "fgsm", 0.5),
        record("best", 1000, "Linf(8/255)", "fgsm", 0.3),
        record("last", 10, "Linf(8/255)", "clean", 0.8),
        record("last", 10, "Linf(8/255)", "fgsm", 0.2),
    ]
    for order in (records, records[::-1]):
        (alike,) = sections._evaluated_alike(order).values()
        assert {(each.checkpoint, each.n) for each in alike} == {("best", 1000)}
        assert radii_of(alike)[1] == {0.0: (0.9, 1000), 4 / 255: (0.5, 1000), 8 / 255: (0.3, 1000)}
