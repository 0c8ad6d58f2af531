"""Runs: what is trained, in which folder, and that stopping in any way changes nothing of the result."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from tests.training.same_runs import assert_same, assert_same_run

from advalign.data import Dataset, Images
from advalign.data import load as load_data
from advalign.errors import TrainingError, UserError
from advalign.models import build
from advalign.objectives.bases.trades import TRADES
from advalign.runs import Run, load
from advalign.runs.checkpoint import load_state, load_weights, save_state
from advalign.runtime.sealed import Owner
from advalign.training.recipes import Recipe, digits
from advalign.training.train import train

MODEL = "small-cnn(width=4)"
QUICK = replace(digits(), epochs=2, steps=2, batch_size=128, subset=600)
COMMAND = [
    sys.executable, "-m", "advalign", "train", "trades+vfd", "--data", "digits", "--model", MODEL, "--recipe", "digits",
    "--epochs", "3", "--steps", "2", "--subset", "600", "--name", "robust", "--device", "cpu",
]  # fmt: skip


def quick(method: str, folder: Path, recipe: Recipe = QUICK, **options) -> Run:
    return train(method, data="digits", model=MODEL, recipe=recipe, runs=folder, device="cpu", **options)


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--runs", str(folder), *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    return folder / "robust"


def killed(folder: Path, states: int) -> bool:
    """Train until so many states were seen on the disk, then kill -9; return whether there was still work to do."""
    process = start(folder, "--checkpoint-seconds", "0")
    state = folder / "robust" / "state.pt"
    seen, last = 0, 0
    while seen < states and process.poll() is None:
        now = state.stat().st_mtime_ns if state.exists() else 0
        seen, last = seen + (now != last), now
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    return not Run.read(folder / "robust").finished


@pytest.mark.slow
def test_kill_9_at_a_random_step_and_resume_gives_the_same_bits(uninterrupted: Path, tmp_path: Path):
    states = random.randint(2, 12)
    # On a busy machine this process may sleep through the end of the other: then earlier, in a folder of its own.
    tries = (tmp_path / str(n) for n in range(states, 0, -1) if killed(tmp_path / str(n), n))
    folder = next(tries)
    again = start(folder)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert_same_run(folder / "robust", uninterrupted)


@pytest.mark.slow
def test_sigterm_saves_and_exits_0_with_how_to_go_on(uninterrupted: Path, tmp_path: Path):
    process = start(tmp_path, "--checkpoint-seconds", "0")
    state = tmp_path / "robust" / "state.pt"
    while not state.exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "SIGTERM" in output
    assert "same command" in output.replace("\n", " ")
    again = start(tmp_path)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert_same_run(tmp_path / "robust", uninterrupted)


@pytest.mark.slow
def test_time_budget_stops_in_good_order_and_the_same_call_goes_on(tmp_path: Path):
    whole = quick("at", tmp_path / "a")
    calls = 1
    while not (run := quick("at", tmp_path / "b", time_budget=0.001)).finished:
        calls += 1
        assert calls < 200
    assert calls > 1
    assert_same_run(whole.path, run.path)


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        pytest.param("trades+vfd", {"average": "ema"}, marks=pytest.mark.slow),
        pytest.param("at+ar-at", {"average": "swa", "average_start": 0.0, "swa_every": 2}, marks=pytest.mark.slow),
        ("at", {"average": "swa", "awp": 0.01, "awp_start": 1}),
        pytest.param("trades+afa", {"label_smoothing": 0.1, "augment": "flip-crop"}, marks=pytest.mark.slow),
        pytest.param("at+part(warmup=0.5)", {}, marks=pytest.mark.slow),
        pytest.param("mtard(balanced=true)", {}, marks=pytest.mark.slow),
        pytest.param("adaiad(begin=0.5)+igdm", {}, marks=pytest.mark.slow),
        pytest.param("at+rebat(begin=0.5)", {"average": "method"}, marks=pytest.mark.slow),
        pytest.param("at+generalist(begin=0.5, every=1)", {}, marks=pytest.mark.slow),
        pytest.param("trades+consistency", {"augment": "flip-crop", "awp": 0.01}, marks=pytest.mark.slow),
        pytest.param("trades+dajat", {"eps_ramp": True, "awp": 0.01, "average": "ema"}, marks=pytest.mark.slow),
        pytest.param("at+sglr(begin=0)", {"awp": 0.01}, marks=pytest.mark.slow),
        pytest.param("trades+adr", {"average": "method", "awp": 0.01}, marks=pytest.mark.slow),
        pytest.param("ikl", {}, marks=pytest.mark.slow),
        pytest.param("iad(begin=0.5)", {}, marks=pytest.mark.slow),
        pytest.param("afa", {}, marks=pytest.mark.slow),
    ],
)
def test_stopping_after_every_step_changes_nothing_whatever_the_method_keeps(
    method: str, changes: dict[str, Any], tmp_path: Path
):
    recipe = replace(QUICK, subset=256, validation=64, **changes)
    whole = quick(method, tmp_path / "a", recipe)
    calls = 1
    while not (run := quick(method, tmp_path / "b", recipe, time_budget=0.001)).finished:
        calls += 1
        assert calls < 100
    assert calls > 2
    assert_same_run(whole.path, run.path)


def test_a_finished_run_is_returned_untouched(tmp_path: Path):
    run = quick("at", tmp_path)
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.path.iterdir()}
    assert quick("at", tmp_path).path == run.path
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in run.path.iterdir()}


@pytest.mark.slow
def test_guests_are_trained_first_and_shared_whatever_the_attack(tmp_path: Path):
    first = quick("trades+vfd", tmp_path)
    second = quick("hat", tmp_path, replace(QUICK, eps=0.1, steps=1))
    assert first.setting["guests"] == second.setting["guests"]
    naturals = [path for path in tmp_path.iterdir() if path.name.startswith("natural")]
    assert len(naturals) == 1
    assert Run.read(naturals[0]).id == first.setting["guests"]["vanilla"]


@pytest.mark.slow
def test_the_robust_teacher_is_the_base_alone_and_shares_its_own_guests(tmp_path: Path):
    run = quick("hat+kd", tmp_path)
    trained = {each.setting["method"]: each for each in map(Run.read, tmp_path.iterdir())}
    assert trained.keys() == {"natural", "hat", "hat+kd"}
    assert run.setting["guests"] == {"vanilla": trained["natural"].id, "robust": trained["hat"].id}
    assert quick("hat", tmp_path).id == trained["hat"].id  # a row of the table already


@pytest.mark.slow
def test_a_guide_learns_with_the_student_and_resumes_with_it(tmp_path: Path):
    whole = quick("trades+lbgat", tmp_path / "a")
    while not (run := quick("trades+lbgat", tmp_path / "b", time_budget=0.001)).finished:
        pass
    assert_same_run(whole.path, run.path)
    assert len(list((tmp_path / "b").iterdir())) == 1  # no run of its own
    state = load_state(run.state)["objective"]
    assert any(key.startswith("nets.guide.") for key in state)
    assert not any("guide" in key for key in load_weights(run.weights("best"))[0])


def test_a_supplied_guest_is_used_and_none_is_trained(tmp_path: Path):
    vanilla = quick("natural", tmp_path / "guests")
    by_folder, by_file = (
        quick("at+vfd", tmp_path / "runs", guests={"vanilla": source}, allow_weak_guest=True)
        for source in (vanilla.path, vanilla.weights("best"))
    )
    assert by_folder.path == by_file.path
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [by_folder.path.name]
    state = load_state(by_folder.state)["objective"]
    assert not any("vanilla" in key for key in state)


def test_best_is_the_first_epoch_of_the_highest_robust_then_clean_accuracy(tmp_path: Path):
    run = quick("at", tmp_path, replace(QUICK, epochs=5))
    scores = [(row["validation"]["robust"], row["validation"]["clean"]) for row in run.log]
    _, card = load_weights(run.weights("best"))
    assert card["epoch"] == scores.index(max(scores)) + 1
    assert load_weights(run.weights("last"))[1]["epoch"] == 5


def test_the_test_set_plays_no_part_in_training(tmp_path: Path):
    data = load_data("digits")
    scrambled = Dataset(
        data.name, data.train, Images(255 - data.test.pixels, data.test.labels.flip(0)), data.class_names
    )
    runs = [
        train("at", data=each, model=MODEL, recipe=QUICK, runs=tmp_path / str(i), device="cpu")
        for i, each in enumerate((data, scrambled))
    ]
    assert runs[0].id != runs[1].id  # other data under the same name are noticed
    assert_same(load_weights(runs[0].weights("best"))[0], load_weights(runs[1].weights("best"))[0])


def test_training_learns_and_the_loaded_model_is_the_trained_one(tmp_path: Path):
    run = quick("natural", tmp_path, replace(QUICK, epochs=8, subset=None))
    model, data = load(run.path), load_data("digits")
    assert not model.training
    with torch.no_grad():
        accuracy = (model(data.test.floats()).argmax(1) == data.test.labels).float().mean()
    assert accuracy > 0.8


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path: Path):
    huge = replace(QUICK, lr=1e25, warmup=1, epochs=4, schedule="constant")
    with pytest.raises(TrainingError, match=r"loss became nan in epoch \d.*--lr"):
        quick("at", tmp_path, huge)
    (folder,) = tmp_path.iterdir()
    if (folder / "state.pt").exists():
        assert all(value.isfinite().all() for value in load_state(folder / "state.pt")["objective"].values())


def test_another_setting_under_the_same_name_is_refused_and_nothing_changes(tmp_path: Path):
    run = quick("at", tmp_path, name="mine")
    before = {file: file.read_bytes() for file in run.path.iterdir()}
    with pytest.raises(UserError, match=r"recipe.eps is 0.2 there and 0.1 here"):
        quick("at", tmp_path, replace(QUICK, eps=0.1), name="mine")
    assert before == {file: file.read_bytes() for file in run.path.iterdir()}


def test_a_run_that_another_process_trains_is_refused(tmp_path: Path):
    folder = tmp_path / "mine"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="mine is being trained by another process"):
        quick("at", tmp_path, name="mine")
    assert not (folder / "run.json").exists()


@pytest.mark.slow
def test_a_guest_that_another_process_trains_is_waited_for_and_shared(tmp_path: Path):
    """Two methods that share a vanilla model start together, as in any sweep: both end well, it is trained once."""
    (tmp_path / "runs").mkdir()
    common = ["--data", "digits", "--model", MODEL, "--recipe", "digits", "--epochs", "2", "--steps", "1"]
    where = ["--subset", "600", "--runs", str(tmp_path / "runs"), "--device", "cpu"]
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "advalign", "train", method, *common, *where],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for method in ("at+vfd", "trades+vfd")
    ]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    runs = [Run.read(path) for path in (tmp_path / "runs").iterdir()]
    assert sorted(run.setting["method"] for run in runs) == ["at+vfd", "natural", "trades+vfd"]
    assert all(run.finished for run in runs)


def test_a_base_alone_is_a_method(tmp_path: Path):
    run = train(TRADES(beta=3), data="digits", model=MODEL, recipe=QUICK, runs=tmp_path, device="cpu")
    assert run.setting["method"] == "trades(beta=3)"


@pytest.mark.parametrize(
    ("broken", "refusal"),
    [
        ("two_outputs", "must return logits.* not tuple in train mode"),
        ("no_batch_of_one", "at on odd_nets:no_batch_of_one fails"),
    ],
)
def test_a_network_that_fails_in_training_is_refused_before_anything_is_written(
    broken: str, refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "odd_nets", raising=False)
    Path("odd_nets.py").write_text(
        "from torch import nn\n"
        "class Two(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = nn.Linear(64, 10)\n"
        "    def forward(self, x):\n"
        "        z = self.fc(x.flatten(1))\n"
        "        return (z, z) if self.training else z\n"
        "def two_outputs(): return Two()\n"
        "def no_batch_of_one(): return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))\n"
    )
    with pytest.raises(UserError, match=refusal):
        train(
            "at",
            data="digits",
            model=f"odd_nets:{broken}",
            recipe=replace(QUICK, batch_size=1),
            runs="runs",
            device="cpu",
        )
    assert not Path("runs").exists()


def test_a_vanilla_model_of_other_data_is_refused(tmp_path: Path):
    vanilla = quick("natural", tmp_path)
    x, y = np.random.default_rng(0).random((400, 8, 8)), np.arange(400) % 10
    np.savez(tmp_path / "other.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    with pytest.raises(UserError, match="was trained on digits, not on npz:"):
        train(
            "at+vfd", data=f"npz:{tmp_path / 'other.npz'}", model=MODEL, recipe=replace(QUICK, subset=200),
            runs=tmp_path / "b", guests={"vanilla": vanilla.path}, device="cpu",
        )  # fmt: skip


def test_the_callers_random_state_comes_back(tmp_path: Path):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    quick("at", tmp_path)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_seeds_differ_and_equal_seeds_agree(tmp_path: Path):
    a, b, c = (
        load_weights(quick("at", tmp_path / folder, replace(QUICK, seed=seed)).weights("last"))[0]
        for folder, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert_same(a, b)
    assert any(not torch.equal(a[key], c[key]) for key in a)


def test_bf16_trains_with_finite_losses(tmp_path: Path):
    run = quick("trades", tmp_path, replace(QUICK, precision="bf16"))
    assert run.finished
    assert all(torch.tensor(row["loss"]).isfinite() for row in run.log)


@pytest.mark.slow
@pytest.mark.weekly
def test_compiled_training_gives_the_same_losses(uninterrupted: Path, tmp_path: Path):
    process = start(tmp_path, "--compile")  # a process of its own: the shape checks under test confuse the compiler
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    for a, b in zip(Run.read(uninterrupted).log, Run.read(tmp_path / "robust").log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-2)
        assert "compile_seconds" not in a
        assert 0 < b["compile_seconds"] < b["seconds"]


def test_clipping_bounds_the_first_update(tmp_path: Path):
    """One plain SGD step from equal weights: the clipped update is lr times a gradient of norm 0.01."""
    one = replace(
        QUICK, epochs=1, subset=128, schedule="constant", momentum=0, nesterov=False, weight_decay=0, clip_norm=0.01
    )
    run = quick("at", tmp_path, one)
    learned = load_state(run.state)["objective"]
    torch.manual_seed(0)
    fresh = train("at", data="digits", model=MODEL, recipe=replace(one, lr=1e-12), runs=tmp_path / "b", device="cpu")
    start_at = load_state(fresh.state)["objective"]
    trained = [key for key in learned if key.endswith(("weight", "bias"))]
    moved = torch.cat([(learned[key] - start_at[key]).flatten() for key in trained]).norm()
    assert moved == pytest.approx(0.01 * one.lr, rel=1e-3)


@pytest.mark.slow
def test_tensorboard_gets_every_epoch(tmp_path: Path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from advalign.runs.tensorboard import tensorboard_sink

    run = quick("trades", tmp_path, sinks=lambda run: [tensorboard_sink(run.path)])
    events = event_accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("loss")] == [1, 2]
    assert {"terms/kl", "validation/robust"} <= set(events.Tags()["scalars"])


def generated(folder: Path, classes: int = 10) -> Path:
    """Noisy copies of digits, as a file of generated images."""
    data = load_data("digits").train
    noise = torch.randint(0, 30, data.pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = (data.pixels // 2 + noise).permute(0, 2, 3, 1).numpy()
    np.savez(folder / "more.npz", image=images, label=data.labels.numpy() % classes)
    return folder / "more.npz"


@pytest.mark.slow
def test_extra_data_train_run_and_guest_and_name_them(tmp_path: Path):
    extra = generated(tmp_path)
    runs = [quick("at+vfd", tmp_path / "runs", extra=each) for each in (None, extra)]
    assert len({run.id for run in runs}) == 2
    assert len({run.setting["guests"]["vanilla"] for run in runs}) == 2
    assert "extra" not in runs[0].setting
    trained = [Run.read(path) for path in (tmp_path / "runs").iterdir()]
    assert sum("extra" in run.setting for run in trained) == 2  # the vanilla model saw them too
    cards = [load_weights(run.weights("best"))[1] for run in runs]
    assert cards[1]["extra"] == runs[1].setting["extra"]
    assert cards[0]["training_images"] == cards[1]["training_images"]
    assert runs[1].log[-1]["loss"] != runs[0].log[-1]["loss"]


@pytest.mark.slow
def test_the_recipes_share_of_each_batch_is_extra_and_validation_is_real(tmp_path: Path):
    """The same digits under another label: what is learned is what the greater part of the batches says."""
    data = load_data("digits").train
    np.savez(tmp_path / "wrong.npz", image=data.pixels.numpy(), label=(data.labels.numpy() + 1) % 10)
    validated = []
    for share in (0.1, 0.9):
        recipe = replace(QUICK, epochs=10, subset=None, extra_share=share)
        run = quick("natural", tmp_path / str(share), recipe, extra=tmp_path / "wrong.npz")
        validated.append(run.log[-1]["validation"]["clean"])
    assert validated[0] > 0.8
    assert validated[1] < 0.1


@pytest.mark.slow
def test_a_run_with_extra_data_goes_on_where_it_stopped(tmp_path: Path):
    extra = generated(tmp_path)
    whole = quick("at", tmp_path / "a", extra=extra)
    while not (run := quick("at", tmp_path / "b", extra=extra, time_budget=0.001)).finished:
        pass
    assert_same_run(whole.path, run.path)


def test_other_extra_data_under_the_same_name_are_refused(tmp_path: Path):
    quick("natural", tmp_path / "runs", extra=generated(tmp_path), name="mine")
    for other in (None, generated(tmp_path, classes=9)):
        with pytest.raises(UserError, match=r"holds another run \(extra is"):
            quick("natural", tmp_path / "runs", extra=other, name="mine")


@pytest.mark.parametrize(
    ("recipe", "extra", "words"),
    [
        (replace(QUICK, batch_size=1), True, r"extra_share=0.7 of a batch of 1 is 1 extra and 0 other"),
        (QUICK, False, "extra data .*nowhere.npz: there is no such file"),
    ],
)
def test_extra_data_that_cannot_work_are_refused_before_anything_is_written(
    recipe: Recipe, extra: bool, words: str, tmp_path: Path
):
    path = generated(tmp_path) if extra else tmp_path / "nowhere.npz"
    with pytest.raises(UserError, match=words):
        quick("natural", tmp_path / "runs", recipe, extra=path)
    assert not (tmp_path / "runs").exists()


def test_an_unknown_method_or_model_is_refused_before_the_data_are_looked_for(tmp_path: Path):
    for method, model, words in (("trade", MODEL, "unknown.*'trade'"), ("trades", "smal-cnn", "unknown.*'smal-cnn'")):
        with pytest.raises(UserError, match=words):
            train(method, data=f"folder:{tmp_path / 'nowhere'}", model=model, runs=tmp_path / "runs")


def test_a_teacher_of_another_architecture_is_given_with_its_model(tmp_path: Path):
    teacher = build("small-cnn(width=6)", classes=10, channels=1)
    file = tmp_path / "teacher.pt"
    torch.save(teacher.state_dict(), file)
    with pytest.raises(UserError, match=r"does not fit.*the robust model.s architecture .* write MODEL@teacher\.pt"):
        quick("rslad", tmp_path, guests={"robust": file})
    teacher_of = {"robust": f"small-cnn(width=6)@{file}"}
    run = quick("rslad", tmp_path / "runs", guests=teacher_of, allow_weak_guest=True)
    assert run.finished
    assert len(list((tmp_path / "runs").iterdir())) == 1
    with pytest.raises(UserError, match="unknown model 'smal-cnn'"):
        quick("rslad", tmp_path, guests={"robust": f"smal-cnn@{file}"})


@pytest.mark.slow
def test_records_distinguish_teachers_but_not_their_seeds(tmp_path: Path):
    """Seeds of one method have teachers of one kind: supplied or trained on the way, of any seed."""
    other, robust = quick("at", tmp_path), quick("trades", tmp_path)
    weak: dict[str, Any] = {"allow_weak_guest": True}
    runs = [
        quick("rslad", tmp_path),
        quick("rslad", tmp_path, replace(QUICK, seed=1)),
        quick("rslad", tmp_path, guests={"robust": other.path}, **weak),
        quick("rslad", tmp_path, replace(QUICK, seed=1), guests={"robust": robust.path}, **weak),
    ]
    kinds = [load_weights(run.weights("best"))[1]["recipe"] for run in runs]
    assert kinds[0] == kinds[1] == kinds[3] != kinds[2]


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that was stopped after its first step."""
    return quick("at", tmp_path_factory.mktemp("half"), time_budget=0.001)


def without(state: dict[str, Any], *keys: Any) -> dict[str, Any]:
    """A state with something inside taken out."""
    *outer, last = keys
    inner = state
    for key in outer:
        inner = inner[key]
    del inner[last]
    return state


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: {**state, "epoch": "x"},
        lambda state: {**state, "epoch": 99},
        lambda state: {**state, "step": -1},
        lambda state: {**state, "log": [*state["log"], {}]},
        lambda state: {**state, "sums": {"loss": 1.0}},
        lambda state: {**state, "sums": {"loss": torch.ones(2)}},
        lambda state: {**state, "best": None},
        lambda state: {**state, "average": None},
        lambda state: {**state, "average": {"count": [1, 2], "weights": []}},
        lambda state: {**state, "average": {"count": -1, "weights": []}},
        lambda state: {**state, "average": {"count": 1, "weights": [torch.ones(1)]}},
        lambda state: without(state, "optimizer", "param_groups", 0, "lr"),
        lambda state: without(state, "optimizer", "state", 0, "momentum_buffer"),
        lambda state: {**state, "objective": {"nets.student.net.x": torch.ones(2)}},
    ],
)
def test_a_state_that_is_none_of_this_run_is_refused(spoil: Any, half: Run, tmp_path: Path):
    shutil.copytree(half.path, tmp_path / half.path.name)
    state = load_state(half.state)
    save_state(tmp_path / half.path.name / "state.pt", spoil(state), Owner(half.id, ""))
    with pytest.raises(UserError, match=r"state\.pt is (no state of this run|damaged)"):
        quick("at", tmp_path)


@pytest.mark.parametrize("leads_to", ["nothing", "state.pt"])
def test_a_state_in_whose_place_is_a_dead_link_is_missed(leads_to: str, half: Run, tmp_path: Path):
    shutil.copytree(half.path, tmp_path / half.path.name)
    state = tmp_path / half.path.name / "state.pt"
    state.unlink()
    state.symlink_to(leads_to)
    with pytest.raises(UserError, match=r"cannot read .*state\.pt: "):
        quick("at", tmp_path)
    assert state.is_symlink()
